"""Warnings about where training is heading: curves and verdicts that must be warned of, and such that must not."""

from dataclasses import replace

import pytest

from hydra_rlhf.model.roles import ROLES
from hydra_rlhf.reporting.findings import find_problems
from hydra_rlhf.reporting.record import RunRecord, Series, Summary, Verdict
from hydra_rlhf.reporting.training_findings import source_names


def run(curves: dict[str, list[float]] | None = None, *, verdicts: tuple[Verdict, ...] = (), **summary) -> RunRecord:
    """A run of which only some PPO curves (from step 1), numbers of the summary and verdicts are known."""
    series = {key: Series(tuple(range(1, len(v) + 1)), tuple(v)) for key, v in (curves or {}).items()}
    return RunRecord(
        name="run",
        finished=bool(summary),
        method="hydra-ppo",
        recipe_text=None,
        recipe={},
        environment={},
        curves={"ppo": series},
        samples=(),
        roles=ROLES["hydra-ppo"],
        bytes_trained={},
        memory_dtype=None,
        methods={},
        plan={},
        decisions=(),
        measured={},
        splits=(),
        summary=Summary(**summary),
        verdicts=verdicts,
    )


def titles(record: RunRecord) -> list[str]:
    return [found.title for found in find_problems(record)]


def verdict(low: float, high: float, judge: str = "llm:m") -> Verdict:
    return Verdict(
        file="evaluation-last.json",
        judge=judge,
        rate=(low + high) / 2,
        interval=(low, high),
        controlled_rate=None,
        controlled_interval=None,
    )


LINEAR = [0.25 * step for step in range(1, 41)]
SQUARE = [0.008 * step**2 for step in range(1, 41)]
DOUBLING = [0.01 * 1.2**step for step in range(1, 41)]


def test_a_kl_that_grows_ever_faster_is_exploding() -> None:
    # 0.01 x 1.2^n has a mean of 0.001 x 1.2^31 x (1.2^10 - 1) / 0.2 = 0.001 x 284.9 x 25.96 = 7.39 over steps 31 to 40,
    # and 1.2^10 = 6.19 times less, 1.19, over the ten before.
    (found,) = find_problems(run({"kl/reference": DOUBLING}))
    assert found.title == "KL is exploding"
    assert "1.19 nats per response in the third quarter" in found.text
    assert "7.39 in the last" in found.text
    assert "ppo.kl_target" in found.remedy


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("in proportion to the steps", LINEAR),
        ("with their square", SQUARE),
        ("fast, but from nothing", [value / 2 for value in DOUBLING]),
        ("fast, over too few steps to say", [0.1, 0.1, 0.1, 0.2, 1, 4, 9, 15]),
        ("fast once, and then no more", [0.5] * 20 + [9.0] * 20),
    ],
)
def test_a_kl_that_grows_otherwise_is_not(words: str, values: list[float]) -> None:
    assert titles(run({"kl/reference": values})) == [], words


def test_a_kl_above_the_limit_is_warned_of_once() -> None:
    assert titles(run({"kl/reference": [4 * value for value in DOUBLING]})) == ["KL is above 20 nats per response"]


def test_a_judge_that_prefers_the_start_is_over_optimisation() -> None:
    rose = {"score_mean": 1.0, "reference_score_mean": 0.0}
    (found,) = find_problems(run(**rose, verdicts=(verdict(0.3, 0.45), verdict(0.4, 0.6, "gold"))))
    assert "judge prefers the start" in found.title
    assert "llm:m (evaluation-last.json): 30.0–45.0" in found.text
    assert "gold" not in found.text
    assert titles(run(**rose, verdicts=(verdict(0.4, 0.6),))) == []
    assert titles(run(**rose, verdicts=(verdict(0.6, 0.8),))) == []
    # A score that fell with the judgement is no over-optimisation of the score.
    assert titles(run(score_mean=0.0, reference_score_mean=1.0, verdicts=(verdict(0.3, 0.45),))) == []


def test_gold_that_falls_while_a_run_is_going_on_is_over_optimisation() -> None:
    # Gold peaks at 0.8 in step 3 and falls by more than a quarter of its span; the score goes on rising.
    curves = {"eval/gold": [0.4, 0.6, 0.8, 0.7, 0.6], "eval/score": [0.0, 1.0, 2.0, 3.0, 4.0]}
    (found,) = find_problems(run(curves))
    assert "score rises while gold falls" in found.title
    assert "peaked at 0.80 in step 3" in found.text
    assert titles(run(curves | {"eval/gold": [0.4, 0.6, 0.7, 0.75, 0.74]})) == []
    assert titles(run(curves | {"eval/score": [0.0, 1.0, 2.0, 1.5, 1.0]})) == []


def test_wins_that_vanish_at_equal_length_are_warned_of() -> None:
    wins = {"score_win_rate_ci": (0.6, 0.8), "score_length_controlled_win_rate": 0.47}
    (found,) = find_problems(run(**wins))
    assert found.title == "The actor wins by the score through length alone"
    assert "at equal length 47.0" in found.text
    assert titles(run(**wins | {"score_length_controlled_win_rate": 0.55})) == []
    gold = {"gold_win_rate_ci": (0.6, 0.8), "gold_length_controlled_win_rate": 0.5}
    assert titles(run(**gold)) == ["The actor wins by the gold through length alone"]
    assert titles(run(**gold | {"gold_win_rate_ci": (0.45, 0.6)})) == []


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        ([0.1] * 15 + [-0.05] * 5, True),
        ([0.1] * 15 + [0.0] * 5, True),  # exactly a constant guess
        ([-9.0] * 10 + [0.3] * 10, False),
        ([0.4] * 39 + [-9.0], False),  # one odd step among the last four
        ([-0.5] * 9, False),  # too young to judge
    ],
)
def test_a_critic_that_explains_nothing_at_the_end_is_useless(values: list[float], warned: bool) -> None:
    record = run({"ppo/explained_variance": values})
    assert titles(record) == (["The critic is no better than a constant"] if warned else [])
    without_critic = {name: role for name, role in record.roles.items() if name != "critic"}
    assert titles(replace(record, roles=without_critic)) == []


@pytest.mark.parametrize(
    ("metric", "values", "title"),
    [
        ("ppo/entropy", [1.0] * 20 + [0.29] * 5, "Entropy is collapsing"),
        ("ppo/entropy", [1.0] * 20 + [0.31] * 5, None),
        ("response/tokens_mean", [40.0] * 20 + [61.0] * 5, "Responses became much longer"),
        ("response/tokens_mean", [40.0] * 20 + [59.0] * 5, None),
        ("response/tokens_mean", [40.0] * 20 + [19.0] * 5, "Responses became much shorter"),
        ("ppo/clip_frac", [0.1] * 20 + [0.31] * 5, "The clip holds back much of each update"),
        ("ppo/clip_frac", [0.5] * 5 + [0.29] * 20, None),
    ],
)
def test_levels_at_the_end_of_an_unfinished_run(metric: str, values: list[float], title: str | None) -> None:
    found = find_problems(run({metric: values}))
    assert [problem.title for problem in found] == ([] if title is None else [title])
    assert all(problem.remedy for problem in found)


def sources(helpful: list[float]) -> dict[str, list[float]]:
    """A run whose score rises from 0 to 1, from a reward head and a source `helpful` with a spread of 0.5."""
    return {
        "score/mean": [0.0] * 10 + [1.0] * 10,
        "reward/head_mean": [0.0] * 10 + [2.0] * 10,
        "reward/head_std": [1.0] * 20,
        "reward/helpful_mean": helpful,
        "reward/helpful_std": [0.5] * 20,
        "reward/helpful_failed": [0.0] * 20,
    }


def test_a_source_that_pays_for_the_others_is_warned_of() -> None:
    falling = sources([1.0] * 10 + [0.4] * 10)
    (found,) = find_problems(run(falling))
    assert found.title == "One source of the reward falls while their sum rises"
    assert "helpful from 1.00 to 0.400" in found.text
    assert titles(run(sources([1.0] * 10 + [0.6] * 10))) == []  # less than its spread
    assert titles(run(falling | {"score/mean": [1.0] * 20})) == []  # the sum does not rise
    alone = {key: values for key, values in falling.items() if not key.startswith("reward/head")}
    assert titles(run(alone)) == []


def test_sources_are_found_by_their_metrics() -> None:
    assert source_names(run(sources([0.0] * 20))) == ["head", "helpful"]
    assert source_names(run({"reward/mean": [1.0], "reward/<b>_mean": [1.0], "reward/masked_frac": [0.0]})) == []


def test_responses_that_have_become_alike_are_warned_of() -> None:
    assert titles(run(distinct_2=0.19, reference_distinct_2=0.4)) == ["Responses have become alike"]
    assert titles(run(distinct_2=0.21, reference_distinct_2=0.4)) == []
