"""The written parts of the benchmarks: what the story rule counts, which openings are held out, what is not shown."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_recipe
import decode_engines
import decode_floor
import gpu_table
import memory
import memory_kept
import memory_peers
import memory_tensors
import memory_workload
import peers_rounds
import real_data
import scaling
import speed_runs
import stories
import story_openings
import story_rule
import tables
import tables_speed
import unequal_lengths

from hydra_rlhf.cli import build_parser
from hydra_rlhf.data.formats import TokenizedDemonstration
from hydra_rlhf.model.generate_batch import AVAILABLE
from hydra_rlhf.model.roles import methods_with
from hydra_rlhf.model.sample import ENGINES
from hydra_rlhf.recipes import load_recipe

PEERS = Path(memory_workload.HERE) / "peers"
WORKLOAD = memory_workload.Workload(shape="30m", batch=2, response=8, micro=2, rank=4, updates=3)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("He ran.", 0),
        # happy, friend, hug in the last two sentences.
        ("They cried. He was happy. His friend gave him a hug!", 3),
        # Only the last two complete sentences count: `sad` (-1); `happy` is too early, `glad` is not finished.
        ("He was happy. He went home. Tom was sad. Then he was glad", -1),
        # A word counts once: happy.
        ("He was happy, happy, happy. Happy Tom was happy.", 1),
        # happy, glad, love, fun are four, held at three.
        ("So happy and glad. Love and fun.", 3),
        # Inside quotes and in capitals: thank (+1), sad and scared (-2).
        ('"Thank you!" Tom, sad and SCARED, said.', -1),
        ("no end", 0),
        ("", 0),
    ],
)
def test_happy_ending(text: str, value: int):
    assert story_rule.happy_ending(text) == value


def test_the_rule_gives_no_word_two_meanings():
    assert not story_rule.HAPPY & story_rule.SAD


def test_openings_hold_no_word_of_the_rule():
    words = {
        word for group in story_openings.openings() for opening in group for word in opening.lower().rstrip(".").split()
    }
    assert not words & (story_rule.HAPPY | story_rule.SAD)


def test_splits_of_openings_are_disjoint_and_change_with_the_seed():
    splits = story_openings.split_openings(0, 60, 20, 10)
    assert [len(split) for split in splits] == [60, 20, 10]
    assert len({opening for split in splits for opening in split}) == 90
    assert splits == story_openings.split_openings(0, 60, 20, 10)
    assert splits != story_openings.split_openings(1, 60, 20, 10)


def test_balanced_pairs_say_nothing_by_their_length():
    # Better minus worse: (0, 1) +7, (2, 3) -8, (4, 5) +9, (6, 7) +30; the first two are of one bin and of either sign.
    lengths = [107, 100, 100, 108, 109, 100, 130, 100]
    pairs = [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert stories.balance_lengths(pairs, lengths) == [(0, 1), (2, 3)]
    assert stories.longer_wins_share([7, -8, 0, 1]) == 0.625


def test_distinct_2():
    # the cat, cat sat | the cat, cat ran: 4 pairs, 3 different.
    assert stories.distinct_2(["The cat sat.", "the cat ran"]) == 0.75


def test_text_of_a_non_commercial_set_is_not_written():
    assert isinstance(real_data.NOT_SHOWN["gpt4_llm"], str)
    assert not set(real_data.PROMPTS_SHOWN) & set(real_data.NOT_SHOWN)


def test_every_data_file_is_checked_without_its_text(tmp_path: Path):
    (tmp_path / "good.jsonl").write_text('{"prompt": "a", "chosen": "zebra", "rejected": "c"}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "zebra", "rejected": "c"}\n{"prompt": "a"}\n')
    (tmp_path / "README.md").write_text("zebra")
    checks = real_data.check_all(tmp_path)
    assert [(check["file"], check["exit_code"], check["bad_rows"]) for check in checks] == [
        ("bad.jsonl", 2, 1),
        ("good.jsonl", 0, 0),
    ]
    assert "zebra" not in str(checks)


def test_the_peers_scripts_are_byte_for_byte_what_their_readme_says():
    named = re.findall(r"^\| `(\w+\.py)` .*`([0-9a-f]{64})` \|$", (PEERS / "README.md").read_text("utf-8"), re.M)
    assert len(named) == 4
    assert dict(named) == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in PEERS.glob("*.py")}


def test_the_recipe_of_the_memory_benchmark_is_the_peers_workload(tmp_path: Path):
    settings = memory_workload.recipe(tmp_path, WORKLOAD, checkpointing="auto", budget="2GiB", name="run")
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    # Two rows of 64 prompt and 8 response tokens are 144 tokens; alpha is twice the rank, as in the peers' scripts.
    assert recipe.ppo.micro_batch_tokens == 144
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets) == (4, 8.0, ("all-linear",))
    assert (recipe.ppo.num_steps, recipe.ppo.num_epochs, recipe.ppo.minibatch_size) == (3, 1, 2)
    assert recipe.ppo.sampling.min_response_tokens == recipe.ppo.sampling.max_response_tokens == 8
    assert recipe.ppo.reward.reward_model_coef == 1.0  # the reward forward is paid for, as by TRL
    assert (recipe.memory.checkpointing, recipe.memory.budget) == ("auto", "2GiB")
    assert recipe.ppo.actor_learning_rate == recipe.ppo.critic_learning_rate == 1e-5


def test_peer_options_name_every_number():
    assert WORKLOAD.peer_options() == (
        ["--updates", "3", "--batch", "2", "--response", "8", "--micro", "2", "--rank", "4"]
    )


def step(seconds: float, tokens: float = 8.0) -> dict[str, float]:
    """A logged PPO step."""
    times = {f"time/{phase}_s": seconds * share for phase, share in (("step", 1), ("rollout", 0.5), ("score", 0.2))}
    return {**times, "time/update_s": 0.3 * seconds, "response/tokens_mean": tokens, "memory/retries": 0.0}


def test_seconds_per_sample_leave_the_first_step_out():
    # Steps of 90, 4 and 6 s with 2 samples each: the median of 4 and 6 is 5, so 2.5 s per sample, half of it rollout.
    seen = memory_peers.read_steps([step(90), step(4), step(6)], WORKLOAD)
    assert (seen["s_per_sample"], seen["rollout_s"], seen["update_s"]) == pytest.approx((2.5, 1.25, 0.75))
    assert seen["memory_metrics"] == {"memory/retries": 0.0}


def test_short_responses_are_no_fair_run():
    with pytest.raises(SystemExit, match="not 8 each"):
        memory_peers.read_steps([step(1), step(1, tokens=7.5)], WORKLOAD)


def test_ratios_of_medians_and_of_the_worst_pair():
    def runs(*numbers: tuple[float, float]) -> list[dict[str, Any]]:
        return [{"peak_rss_mib": peak, "s_per_sample": seconds} for peak, seconds in numbers]

    found = memory_peers.summarise(
        {"hydra-none": runs((20, 1), (30, 3), (22, 2)), "trl-lora": runs((100, 4), (110, 8), (90, 5))}
    )
    # Medians 22 and 100, 2 s and 5 s; the worst pair is 30 against 90. Only pairs of us and a peer are compared.
    assert found["ratios"] == [
        {
            "hydra": "hydra-none",
            "peer": "trl-lora",
            "peak_ratio": pytest.approx(0.22),
            "worst_peak_ratio": pytest.approx(1 / 3),
            "time_ratio": pytest.approx(0.4),
            "bar": 0.25,
        }
    ]


def test_a_process_is_measured_from_outside():
    # 64 MiB of ones are held once; the interpreter takes some 10 MiB, this test with torch far more. So the measuring
    # process must be a small one, as the benchmark's is: the kernel counts it until the measured program begins.
    measured = "x = bytearray(b'1') * (64 * 2**20); print('noise'); print('{}')"
    measuring = (
        "import sys; from memory_workload import last_json, run_measured\n"
        f"found = run_measured([sys.executable, '-c', {measured!r}], threads=1)\n"
        "print(found.peak_rss_mib, last_json(found.output))"
    )
    done = subprocess.run(
        [sys.executable, "-c", measuring], cwd=memory_workload.HERE, capture_output=True, text=True, check=True
    )
    peak, said = done.stdout.split()
    assert said == "{}"
    assert 64 < float(peak) < 128


def test_the_measuring_process_stays_small():
    code = (
        "import sys, memory, speed; print([name for name in ('torch', 'numpy', 'hydra_rlhf') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=memory_workload.HERE, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_process_that_fails_says_why():
    with pytest.raises(SystemExit, match="no such thing"):
        memory_workload.run_measured([sys.executable, "-c", "raise ValueError('no such thing')"], threads=1)


@pytest.mark.parametrize(
    ("targets", "units"),
    # Llama-7B, mlp / hidden = 2.6875: 1 + 1 + 1 + 1 + 2 + 1 + 2 * 2.6875 + 4 * 128 / 4096; all linears add the second
    # normed input and three more low-rank activations.
    [("q,k,v,o", 12.5), ("all-linear", 12.5 + 1 + 3 / 32)],
)
def test_ideal_of_what_a_layer_keeps(targets: str, units: float):
    assert memory_kept.ideal_units(memory_kept.SHAPES["llama-7b"], targets) == units


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", memory_kept.TARGETS)
def test_a_layer_keeps_little_more_than_the_ideal(targets: str, dtype: torch.dtype):
    shape = memory_kept.SHAPES["llama-7b / 16"]
    units = memory_kept.units_kept("ours", shape, targets, dtype, "cpu")
    assert 1.0 <= units / memory_kept.ideal_units(shape, targets) <= memory.KEPT_BAR


def test_responses_of_full_sft_are_as_long_as_those_of_ppo():
    example = TokenizedDemonstration([1, 2], [3, 4, 5])
    assert memory_tensors.full_length(example, WORKLOAD).response_ids == [3, 4, 5, 3, 4, 5, 3, 4]


def test_speed_is_measured_on_the_peers_workload(tmp_path: Path):
    options = speed_runs.workload_options(tmp_path, WORKLOAD)
    args, settings = build_parser().parse_known_args(["bench", *options, "--dtype", "float32"])
    assert (args.batch, args.response_tokens, args.micro_batch, args.rank, args.iterations) == (2, 8, 2, 4, 3)
    assert (args.model, args.prompts) == (str(tmp_path / "model"), str(tmp_path / "pairs.jsonl"))
    assert args.prompt_tokens == memory_workload.PROMPT_TOKENS
    assert settings == ["--ppo.sampling.temperature", "0.7"]
    assert methods_with("ppo") == speed_runs.METHODS


def test_one_set_of_rounds_makes_both_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, str]] = []

    def run(name, result):
        def answer(*arguments, **_):
            asked.append((name, next(a for a in arguments if str(a).startswith(("hydra-", "trl-", "agilerl")))))
            return {"peak_rss_mib": 1.0, "s_per_sample": result}

        return answer

    monkeypatch.setattr(peers_rounds, "run_system", run("memory", 2.0))
    monkeypatch.setattr(peers_rounds, "run_on_workload", run("speed", 1.0))
    monkeypatch.setattr(peers_rounds, "described", lambda *_, **__: {"workload": {}})
    monkeypatch.setattr(peers_rounds, "make_workload", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["peers_rounds.py", "--repeats", "2", "--results", str(tmp_path)])
    peers_rounds.main()
    memory_part, speed_part = (json.loads((tmp_path / f"{n}.json").read_text())["peers"] for n in ("memory", "speed"))
    assert set(memory_part["medians"]) == {"hydra-auto", "trl-lora", "trl-best", "agilerl"}
    assert set(speed_part["s_per_sample"]) == {"hydra-float32", "hydra-default", "trl-lora", "trl-best", "agilerl"}
    assert memory_part["runs"]["agilerl"] == speed_part["runs"]["agilerl"]
    assert [name for name, _ in asked] == 2 * ["memory", "speed", "speed", "memory", "memory", "memory"]
    assert len(memory_part["ratios"]) == 3
    assert {entry["speedup"] for entry in speed_part["speedups"]} == {2.0}


def test_speedups_of_medians_and_of_the_worst_pair():
    runs = {
        system: [{"s_per_sample": seconds} for seconds in rounds]
        for system, rounds in {"hydra-float32": (1, 3, 2), "hydra-default": (4, 4, 4), "agilerl": (9, 6, 8)}.items()
    }
    found = speed_runs.speedups(runs)
    assert found["s_per_sample"] == {"hydra-float32": 2, "hydra-default": 4, "agilerl": 8}
    # 8 / 2 and 8 / 4; the fastest round of the peer takes 6 s, our slowest ones 3 s and 4 s.
    assert [(s["hydra"], s["peer"], s["speedup"], s["worst_speedup"]) for s in found["speedups"]] == [
        ("hydra-float32", "agilerl", 4.0, 2.0),
        ("hydra-default", "agilerl", 2.0, 1.5),
    ]


def test_a_decode_step_is_what_each_token_after_the_first_takes():
    # 11 tokens in 7 s, the first in 2 s: half a second each; the floor is 0.2 + 0.04 + 0.01 s.
    taken = {"long": 7.0, "first": 2.0, "matrices": 0.2, "cache": 0.04, "logits": 0.01}
    found = decode_floor.against_floor(taken, 11)
    assert (found["step_s"], found["floor_s"], found["ratio"]) == pytest.approx((0.5, 0.25, 2.0))


def test_the_floor_is_every_product_of_the_actor():
    from hydra_rlhf.benchmark.subject import build_model

    model = build_model(bench_recipe.bench_recipe("scratch:tiny", batch=2, prompt=4, response=3, iterations=1, rank=2))
    floor = decode_floor.Floor(model, 2, 800)
    assert len(floor.products) == 4 * 7  # layers x (q, k, v, o, gate, up, down)
    assert all(tuple(a.shape) == (2, weight.shape[1]) for weight, a, _ in floor.products)
    assert floor.cache.numel() * 4 == 800
    for part in (floor.matrices, floor.read_cache, floor.read_logits):
        part()
    decode_floor.decode(model, torch.ones(2, 4, dtype=torch.long), 3)


def test_prompts_of_the_engines_are_evenly_spread():
    work = decode_engines.Workload(prompts=4, shortest=2, longest=8)
    assert decode_engines.prompt_lengths(work) == [2, 4, 6, 8]


def test_engines_beside_each_other_are_those_of_the_project():
    part = {
        "shape": "shape:x",
        "settings": {"prompts": 4, "shortest": 2, "longest": 8, "rows": 2},
        "rows": [
            {
                "responses": "full",
                "mean_length": 6.0,
                "engines": {
                    "slots": {"median_s": 2.0, "rounds_s": [1.0, 2.0, 3.0]},
                    "generate": {"median_s": 3.0, "rounds_s": [3.0, 3.0, 3.0]},
                },
            }
        ],
    }
    table = tables_speed.decode_engines(part)
    assert "| full | 6 | `slots` | 2.00 | 1.00, 2.00, 3.00 | 1.00 x |" in table
    assert "| full | 6 | `generate` | 3.00 | 3.00, 3.00, 3.00 | 1.50 x |" in table


@pytest.mark.skipif(not AVAILABLE, reason="needs newer transformers")
def test_engines_give_the_same_responses_in_turns(capsys: pytest.CaptureFixture):
    decode_engines.main(["--quick"])
    full, unequal = json.loads(capsys.readouterr().out)["rows"]
    assert full["mean_length"] == 6
    assert 1 <= unequal["mean_length"] < 6
    for row in (full, unequal):
        assert set(row["engines"]) == set(ENGINES)
        assert all(found["same_responses"] == 1.0 for found in row["engines"].values())
        assert all(len(found["rounds_s"]) == 1 for found in row["engines"].values())


def test_share_of_padding():
    # Two rows of 4 + 6 columns hold 4 + 6 and 4 + 2 tokens: 4 of 20 are padding.
    assert unequal_lengths.padding_share(4, [6, 2]) == pytest.approx(0.2)
    assert unequal_lengths.padding_share(4, [6, 6]) == 0.0


def test_lengths_are_those_of_the_responses():
    lengths = unequal_lengths.Lengths()
    assert lengths(["a", "b"], ["x", "y"], [[1, 2], [3]]) == [0.0, 0.0]
    assert lengths.steps == [[2, 1]]


def test_responses_of_unequal_length_are_measured(tmp_path: Path):
    path = bench_recipe.llama_folder(tmp_path / "model", hidden=64, layers=1, vocab=unequal_lengths.VOCAB)
    row = unequal_lengths.measure(path, batch=4, response=8, mean_length=3, iterations=2)
    assert 1 < row["mean_length"] < 8
    assert row["padding_share"] > 0


def test_curves_go_through_one_point():
    points = list(scaling.points({"a": 1, "b": 5}, {"a": [1, 2], "b": [5, 6]}))
    assert points == [
        ("a", {"a": 1, "b": 5}),
        ("a", {"a": 2, "b": 5}),
        ("b", {"a": 1, "b": 5}),
        ("b", {"a": 1, "b": 6}),
    ]
    assert all(scaling.BASE[name] in values for name, values in scaling.CURVES.items())
    assert all(scaling.QUICK_BASE[name] in values for name, values in scaling.QUICK.items())


def test_the_gpu_table_is_made_row_by_row_on_any_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from hydra_rlhf.benchmark import bench, machine

    little = {"array_bytes": 2**20, "matrix_size": 64, "seconds": 0.001}
    monkeypatch.setattr(bench, "this_machine", lambda *which: machine.measure_machine(*which, **little))
    out = tmp_path / "gpu.json"
    sizes = ["--batch", "1", "--prompt-tokens", "2", "--response-tokens", "2", "--rank", "2", "--iterations", "1"]
    tiny = ["gpu_table.py", "--out", str(out), "--shape", "smollm2-135m", "--device", "cpu", *sizes, "--max-batch", "2"]
    monkeypatch.setattr(sys, "argv", [*tiny, "--part", "methods", "--method", "j-hydra-ppo"])
    gpu_table.main()
    # A shape's name is all that is special about a small one.
    monkeypatch.setattr(sys, "argv", [word.replace("smollm2-135m", "scratch:tiny") for word in tiny])
    monkeypatch.setattr(gpu_table, "CURVE_METHODS", ("hydra-ppo",))
    sys.argv += ["--dtype", "float32", "--part", "nf4", "--part", "curve", "--budgets", "1GiB", "450MiB"]
    gpu_table.main()
    found = json.loads(out.read_text())
    assert [(row["method"], row["status"]) for row in found["methods"]["rows"]] == [("j-hydra-ppo", "measured")]
    assert found["nf4"]["bench"]["quantization"] == "nf4"
    assert [(row["budget"], row["status"]) for row in found["curve"]["rows"]] == [
        ("1GiB", "measured"),
        ("450MiB", "planned"),
    ]
    written = tables.filled("<!-- begin: gpu-curve -->\n<!-- end -->", {"gpu": found})
    assert "| `hydra-ppo` | 450MiB | 1 | 0.0 | – | planned only |" in written


def test_tables_are_written_between_their_markers():
    document = "a\n<!-- begin: memory-kept -->\nold\n<!-- end -->\nb\n"
    missing = tables.filled(document, {})
    assert missing.startswith("a\n<!-- begin: memory-kept -->\nNot measured yet: `python benchmarks/memory.py ")
    measured = {
        "date": "2026-01-02",
        "cores": 2,
        "cpu": "CPU",
        "threads": 1,
        "versions": {"torch": "2", "transformers": "5"},
        "load_average_before": [0.25, 0, 0],
    }
    results = {"memory": {"kept": {"worst_ratio": 1.0312, "bar": 1.1, "measured": measured}}}
    written = tables.filled(missing, results)
    assert "| of the ideal | <= 1.10 x | 1.031 x |" in written
    assert (
        "Measured 2026-01-02 on 2 cores (CPU), 1 threads, torch 2, transformers 5; load average before: 0.2." in written
    )
    assert written.endswith("<!-- end -->\nb\n")
    assert tables.filled(written, results) == written


def test_the_document_is_what_the_script_writes():
    document = tables.DOCUMENT.read_text("utf-8")
    assert set(tables.TABLES) == {name for _, name, _ in tables.BLOCK.findall(document)}
    assert tables.filled(document, tables.read_results(tables.RESULTS)) == document, "run python benchmarks/tables.py"
