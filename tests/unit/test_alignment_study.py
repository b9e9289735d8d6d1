"""The alignment study: its numbers by hand, its table of systems, and what it does with runs that are there already."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import alignment_answers
import alignment_numbers
import alignment_overoptimisation
import alignment_peer
import alignment_picture
import alignment_runs
import alignment_study
import alignment_systems
import hydra_sft_read
import hydra_sft_study
import tables_alignment
from alignment_runs import Bench
from alignment_systems import Player
from smoke.tiny_runs import recipe

from hydra_rlhf.model.export import save_peft_adapter
from hydra_rlhf.recipes import parse_recipe
from hydra_rlhf.stages.finished import load_finished
from hydra_rlhf.stages.pipeline import run_recipe


def test_settings_are_laid_over_one_another():
    one = {"a": {"b": 1, "c": 2}, "d": 3}
    assert alignment_systems.merged(one, {"a": {"c": 4}}, {"d": {"e": 5}}) == {"a": {"b": 1, "c": 4}, "d": {"e": 5}}
    assert one == {"a": {"b": 1, "c": 2}, "d": 3}


@pytest.mark.parametrize("name", ["ppo", "lora-ppo", "d-lora-ppo", "j-hydra-ppo", "hydra-ppo"])
def test_every_method_sees_equally_many_samples(name: str):
    system = alignment_systems.SYSTEMS[name]
    for point in ({}, *system.grid):
        settings = alignment_systems.merged(alignment_systems.BASE, system.settings, point, {"name": name})
        ppo = parse_recipe(settings, source=name).ppo
        assert ppo.num_steps * ppo.rollout_batch_size * ppo.samples_per_prompt == 3072


def test_grouped_samples_are_as_many():
    for name in alignment_study.CRITIC_FREE:
        ppo = alignment_systems.SYSTEMS[name].settings["ppo"]
        assert ppo["rollout_batch_size"] * ppo["samples_per_prompt"] == alignment_systems.ROLLOUT_SEQUENCES


@pytest.mark.parametrize("name", alignment_systems.SYSTEMS)
def test_what_is_reported_was_among_what_was_tried(name: str):
    system = alignment_systems.SYSTEMS[name]
    assert any(alignment_systems.merged(system.settings, point) == system.settings for point in system.grid)
    assert alignment_systems.TRL_SETTINGS in alignment_systems.TRL_GRID


def test_development_seeds_are_not_reported():
    assert not set(alignment_systems.SEEDS) & set(alignment_systems.DEVELOPMENT_SEEDS)


def test_who_answers_follows_from_what_was_trained():
    found = alignment_systems.players(("lora-ppo", "hydra-ppo"), with_trl=True)
    assert [(player.name, player.run, player.start) for player in found] == [
        ("sft", "lora-ppo", None),
        ("hydra-sft", "hydra-ppo", None),
        ("lora-ppo", "lora-ppo", "sft"),
        ("hydra-ppo", "hydra-ppo", "hydra-sft"),
        ("best-of-16", "hydra-ppo", "hydra-sft"),
        ("trl-ppo", "hydra-ppo", "hydra-sft"),
    ]


def test_the_spread_is_of_seeds_and_of_prompts():
    # Seed means 1 and 3, variance 2; prompt means 1, 2, 3, variance 1: 2 / 2 + 1 / 3 = 4 / 3. Degrees of freedom
    # (16 / 9) / (1 / 1 + (1 / 9) / 2) = 32 / 19.
    error, freedom = alignment_numbers.spread(np.array([[0.0, 1, 2], [2, 3, 4]]))
    assert error == pytest.approx((4 / 3) ** 0.5)
    assert freedom == pytest.approx(32 / 19)
    # One seed: prompts alone, variance 1 over 3, two degrees of freedom.
    assert alignment_numbers.spread(np.array([[1.0, 2, 3]])) == pytest.approx(((1 / 3) ** 0.5, 2))


def test_students_points_are_never_too_small():
    assert [alignment_numbers.student(freedom) for freedom in (0.4, 2.9, 11, 5000)] == [12.706, 4.303, 2.228, 1.962]


def test_win_rates_count_ties_half():
    won = alignment_numbers.outcomes(np.array([[1.0, 2], [3, 4]]), np.array([[0.0, 2], [4, 3]]))
    assert won.tolist() == [[1, 0.5], [0, 1]]
    found = alignment_numbers.rate(won)
    assert (found["mean"], found["per_seed"]) == (0.625, [0.75, 0.5])


def test_all_ties_are_no_certainty():
    # No outcome differs, so it is Wilson's interval of as many outcomes as prompts: 0.5 +- 0.5 t / sqrt(4 + t^2), t of
    # four degrees of freedom.
    found = alignment_numbers.rate(np.full((3, 4), 0.5))
    assert found["ci"] == pytest.approx([0.0943, 0.9057], abs=1e-4)


def test_an_interval_is_as_wide_as_the_seeds_differ():
    # Half the prompts won by every seed, or all of them by half the seeds: 0.5 both times, but one is sure of it.
    prompts = np.tile([1.0, 0.0], (4, 200))
    seeds = np.repeat([[1.0], [1.0], [0.0], [0.0]], 400, axis=1)
    alike, apart = (alignment_numbers.rate(won)["ci"] for won in (prompts, seeds))
    # Standard errors sqrt(0.25 / 399) and, between seeds, sqrt((1 / 3) / 4), so n = 399 and 3 in Wilson's
    # 0.5 +- 0.5 t / sqrt(n + t^2), with t = 1.980 and, for three degrees of freedom, 3.182.
    assert alike == pytest.approx([0.4507, 0.5493], abs=1e-4)
    assert apart == pytest.approx([0.0608, 0.9392], abs=1e-4)


def test_a_round_robin_averages_one_half():
    golds = {"a": np.full((3, 4), 3.0), "b": np.full((3, 4), 2.0), "c": np.full((3, 4), 2.0)}
    found = alignment_numbers.round_robin(golds)
    # a beats both; b and c lose to a and tie with each other.
    assert {name: one["mean"] for name, one in found.items()} == {"a": 1.0, "b": 0.25, "c": 0.25}


def test_a_head_to_head_is_within_a_seed():
    # Seed by seed b is one point above a, though a's second seed is above b's first.
    golds = {"a": np.repeat([[1.0], [5.0], [3.0]], 40, axis=1), "b": np.repeat([[2.0], [6.0], [4.0]], 40, axis=1)}
    found = alignment_numbers.head_to_head(golds)
    assert (found["b/a"]["mean"], found["a/b"]["mean"]) == (1.0, 0.0)
    assert found["b/a"]["gold_difference"] == 1.0
    assert found["b/a"]["gold_difference_ci"] == pytest.approx([1.0, 1.0])
    assert found["b/a"]["significant"]


def test_students_interval_over_seeds():
    # Mean 2, deviation 1: 4.303 / sqrt(3) = 2.4843.
    found = alignment_numbers.over_seeds([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["ci"] == pytest.approx([-0.4843, 4.4843], abs=1e-4)
    assert alignment_numbers.over_seeds([1.0])["ci"] is None


def test_gold_at_equal_seconds():
    def points(*pairs: tuple[float, float]) -> list[dict[str, float]]:
        return [{"seconds": seconds, "gold": gold} for seconds, gold in pairs]

    # Seed 0: the other is done at 15 s; ours is then half way from 4 to 8. Seed 1: ours is done at 10 s.
    ours = [points((10, 4), (20, 8)), points((10, 5))]
    theirs = [points((15, 7)), points((5, 1), (15, 3))]
    found = alignment_numbers.equal_seconds(ours, theirs)
    assert (found["seconds"], found["gold"]) == (12.5, [5.5, 4.5])
    assert found["difference"]["per_seed"] == [-1.0, 3.0]


def curve_of(*golds: float) -> list[dict[str, float]]:
    """Looks whose learned score and KL rise by one each."""
    return [
        {"step": step, "seconds": step, "gold": gold, "score": step, "kl": step} for step, gold in enumerate(golds, 1)
    ]


def test_over_optimisation_is_gold_that_falls_while_the_score_rises():
    found = alignment_numbers.over_optimisation(curve_of(3, 5, 4, 2))
    assert (found["gold_start"], found["gold_peak"], found["gold_end"]) == (3, 5, 2)
    assert (found["peak_step"], found["score_at_peak"], found["score_end"], found["kl_end"]) == (2, 2, 4, 4)
    assert found["over_optimised"]
    assert found["fall_step"] == 3  # 4 and 2 are below 4.5
    rising = alignment_numbers.over_optimisation(curve_of(3, 4, 5))
    assert (rising["over_optimised"], rising["fall_step"]) == (False, None)
    slack = alignment_numbers.over_optimisation(curve_of(3, 5, 4.8))  # as looks at a sample of prompts differ
    assert (slack["over_optimised"], slack["fall_step"]) == (False, None)
    # Of 20 looks the end is the mean of the last two.
    assert alignment_numbers.over_optimisation(curve_of(*[9] * 18, 4, 2))["gold_end"] == 3


def test_bars_say_what_holds():
    methods = {
        "hydra-ppo": {"gold_win_rate_vs_start": 0.86, "kl": 11.0, "seconds": 3.0},
        "trl-ppo": {"seconds": 6.0},
    }
    found = alignment_study.bars({"methods": methods, "head_to_head": {"hydra-ppo/trl-ppo": {"mean": 0.46}}})
    assert [(row["found"], row["holds"]) for row in found] == [(0.86, True), (11.0, False), (0.46, False), (0.5, True)]


def bench(folder: Path, parallel: int = 1) -> Bench:
    return Bench(work=folder, parallel=parallel, trl_python="trl-python", base={})


def test_a_finished_run_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[list[str]] = []
    monkeypatch.setattr(alignment_runs, "run_measured", lambda line, **_: seen.append(line))
    study = bench(tmp_path)
    system = alignment_systems.SYSTEMS["hydra-ppo"]
    study.system(system, 3)
    path = tmp_path / "recipes" / "hydra-ppo-s3.yaml"
    assert [line[2:] for line in seen] == [["hydra_rlhf.cli", "run", str(path), "--resume"]]
    settings = json.loads(path.read_text())
    assert settings["start"] == {"hydra_sft": str(tmp_path / "runs" / "start-hydra-s3" / "hydra_sft")}
    assert settings["seed"] == 3
    run = study.folder("hydra-ppo", 3)
    run.mkdir(parents=True)
    (run / "stages.json").write_text('{"ppo": {"done": true}, "evaluation": {"done": false}}')
    study.system(system, 3)
    assert len(seen) == 2
    (run / "stages.json").write_text('{"ppo": {"done": true}, "evaluation": {"done": true}}')
    study.system(system, 3)
    assert len(seen) == 2


def test_the_first_failure_ends_the_study(tmp_path: Path):
    done: list[int] = []

    def fail() -> None:
        raise SystemExit("no such thing")

    with pytest.raises(SystemExit, match="no such thing"):
        bench(tmp_path).each([lambda: done.append(1), fail, *[lambda: done.append(2)] * 20])
    assert done == [1]


def test_seconds_are_those_of_the_steps(tmp_path: Path):
    lines: list[dict[str, Any]] = [
        {"stage": "ppo", "step": 1, "time/step_s": 2.0},
        {"stage": "ppo", "step": 2, "time/step_s": 3.0, "eval/gold": 7.0, "eval/score": 1.0, "eval/kl": 0.5},
        {"stage": "evaluation", "step": 2, "eval/score": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "costs.json").write_text('{"wall_s": 9.0, "peak_rss_bytes": 4}')
    assert alignment_runs.training_cost(tmp_path) == {"seconds": 5.0, "peak_bytes": 4, "wall_s": 9.0}
    assert alignment_runs.curve(tmp_path) == [{"step": 2, "seconds": 5.0, "gold": 7.0, "score": 1.0, "kl": 0.5}]


def test_a_warning_has_the_step_from_which_a_report_shows_it(tmp_path: Path):
    lines = [
        {"stage": "ppo", "step": step, "kl/reference": kl, "eval/gold": 5.0, "eval/score": 1.0, "eval/kl": kl}
        for step, kl in enumerate((1.0, 2.0, 30.0, 40.0), 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "recipe.yaml").write_text("name: a\n")
    (tmp_path / "samples.jsonl").write_text("")
    points = alignment_runs.curve(tmp_path)
    assert alignment_overoptimisation.first_warnings(tmp_path, points)["KL is above 20 nats per response"] == 3


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished PPO, and a second one that began from its start, named as the study names its runs."""
    folder = tmp_path_factory.mktemp("study")
    start = run_recipe(recipe(folder / "runs", name="start-hydra-s0"), until="hydra_sft")
    given = {"start__hydra_sft": str(start / "hydra_sft")}
    run_recipe(recipe(folder / "runs", name="hydra-ppo-s0", **given), until="ppo")
    return folder


def test_a_peers_adapter_answers_as_the_actor_it_was_taken_from(tiny_run: Path):
    finished = load_finished(tiny_run / "runs" / "hydra-ppo-s0", "last")
    trunk = finished.model.trunk("hydra")
    save_peft_adapter(trunk, "actor", tiny_run / "runs" / "trl-ppo-s0" / "actor")
    texts = alignment_answers.world_prompts("test", 4, 0)
    players = [Player(name="hydra-ppo", run="hydra-ppo"), Player(name="trl-ppo", run="hydra-ppo", adapter=True)]
    ours, peers = (
        alignment_answers.answer(alignment_answers.load_player(tiny_run / "runs", player, 0), player, texts)
        for player in players
    )
    for name in ("texts", "gold", "score", "kl"):
        assert ours[name] == peers[name]
    start = alignment_answers.answer(finished, Player(name="hydra-sft", run="hydra-ppo", role="reference"), texts)
    assert start["texts"] != ours["texts"]
    assert start["kl"] == 0.0
    best = alignment_answers.answer(finished, Player(name="best", run="hydra-ppo", best_of=2), texts)
    assert len(best["texts"]) == 4


def test_a_peer_gets_the_prompts_that_the_run_sampled_for(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tiny_run / "runs" / "hydra-ppo-s0"
    monkeypatch.setattr(sys, "argv", ["alignment_peer.py", str(run), str(tmp_path / "inputs")])
    alignment_peer.main()
    rows = [json.loads(line)["input_ids"] for line in (tmp_path / "inputs" / "prompts.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 4  # steps x prompts
    tokenizer = load_finished(run, "last").model.tokenizer
    texts = {tokenizer.decode(ids, skip_special_tokens=True) for ids in rows}
    sampled = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    logged = {sample["prompt"] for sample in sampled if sample["kind"] == "rollout"}
    assert logged <= texts
    workload = json.loads((tmp_path / "inputs" / "workload.json").read_text())
    assert (workload["num_steps"], workload["num_minibatches"], workload["num_epochs"]) == (2, 2, 2)


def test_hydra_sft_is_compared_pair_by_pair():
    def seed(hydra: list[float], separate: list[float]) -> dict[str, Any]:
        return {
            "hydra": {"logprobs": hydra, "num_tokens": [2, 2], "margins": [1.0, -1.0]},
            "separate": {"logprobs": separate, "num_tokens": [2, 2], "margins": [1.0, 0.0]},
        }

    found = hydra_sft_study.compare([seed([-2.0, -2.0], [-2.0, -2.0]), seed([-3.0, -2.6], [-2.0, -2.0])])
    # 1.6 nats more over 8 tokens: a ratio of exp(0.2). Half a pair of two is right less: -0.25.
    assert found["perplexity_ratio"]["mean"] == pytest.approx(1.2214, abs=1e-4)
    assert found["reward_accuracy_difference"]["mean"] == -0.25
    assert [row["holds"] for row in found["bars"]] == [False, False]
    assert found["perplexity"]["separate"]["per_seed"] == pytest.approx([2.7183, 2.7183], abs=1e-4)


def test_held_out_pairs_are_read_as_the_evaluation_reads_them(tiny_run: Path):
    from hydra_rlhf.evaluation.preferences import read_pairs
    from hydra_rlhf.stages.datasets import load_raw, tokenize

    run = tiny_run / "runs" / "start-hydra-s0"
    found = hydra_sft_read.read(run, "hydra_sft")
    finished = load_finished(tiny_run / "runs" / "hydra-ppo-s0", "last")
    settings = finished.run.recipe
    pairs = tokenize(load_raw(settings.data, seed=settings.seed), finished.chat).test_pairs
    fit = read_pairs(finished.model, pairs, ["reference", "reward"], limits=finished.limits)
    assert found["margins"] == pytest.approx(fit.margins, abs=1e-5)
    perplexity = float(np.exp(-sum(found["logprobs"]) / sum(found["num_tokens"])))
    assert perplexity == pytest.approx(fit.perplexity, rel=1e-5)


def test_tables_show_bars_and_intervals():
    rows = [{"what": "win rate", "bar": ">= 0.85", "found": 0.8412, "holds": False}]
    assert "| win rate | >= 0.85 | 0.841 | **no** |" in tables_alignment.bars({"bars": rows})
    found = {
        "mean": 0.6,
        "ci": [0.52, 0.68],
        "significant": True,
        "gold_difference": 1.0,
        "gold_difference_ci": [0.5, 1.5],
    }
    pairs = {"hydra-ppo/sft": found, "sft/hydra-ppo": found, "hydra-ppo/dpo": found | {"significant": False}}
    text = tables_alignment.head_to_head({"head_to_head": pairs})
    assert "| `sft` | 0.60 [0.52, 0.68] | 1.00 [0.50, 1.50] | better |" in text
    assert "| `dpo` | 0.60 [0.52, 0.68] | 1.00 [0.50, 1.50] | not significant |" in text
    assert text.count("\n") == 3
    assert tables_alignment.first_warnings({"later": 9, "sooner": 4}) == "4: sooner; 9: later"
    assert tables_alignment.first_warnings({}) == "none"


def test_the_picture_is_of_means_over_seeds(tmp_path: Path):
    curves = [curve_of(2, 4), curve_of(4, 8)]
    assert alignment_picture.mean_curve(curves)["gold"] == [3, 6]
    result = {
        "methods": {"hydra-ppo": {"curves": curves}, "sft": {}},
        "overoptimisation": {"runs": {"without KL": {"curves": curves}}},
    }
    alignment_picture.save_picture(result, tmp_path / "a.svg")
    assert "A weak reward model, without KL" in (tmp_path / "a.svg").read_text()
