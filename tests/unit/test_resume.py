"""Which changed settings a run can be resumed with, setting by setting and at each point of a run."""

import copy
from dataclasses import asdict, fields
from typing import Any

import pytest

from hydra_rlhf.config import PPOConfig, Recipe
from hydra_rlhf.recipes import lay_over, setting_names
from hydra_rlhf.runtime.resume import RULES, Past, refusals, reopened

NOTHING = Past(begun=frozenset(), done=frozenset(), ppo_steps=0)
IN_STAGE1 = Past(begun=frozenset({"hydra_sft"}), done=frozenset(), ppo_steps=0)
IN_PPO = Past(begun=frozenset({"hydra_sft", "ppo"}), done=frozenset({"hydra_sft"}), ppo_steps=40)
MEASURED = Past(
    begun=frozenset({"hydra_sft", "ppo", "evaluation"}),
    done=frozenset({"hydra_sft", "ppo", "evaluation"}),
    ppo_steps=100,
)


def settings(**changes: Any) -> dict[str, Any]:
    """The default settings with changes (two underscores for a dot)."""
    content = copy.deepcopy(asdict(Recipe(name="a")))
    for name, value in changes.items():
        lay_over(content, name.replace("__", "."), value)
    return content


def refused(past: Past, old: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    """Refusals of these changes to the defaults, or to `old`."""
    return refusals(settings(**old or {}), settings(**(old or {}) | changes), past)


@pytest.mark.parametrize(
    "change",
    [
        {"ppo__save_every": 1},
        {"hydra_sft__save_every": 0},
        {"runtime__keep_checkpoints": 9},
        {"ppo__num_logged_samples": 0},
        {"ppo__eval_every": 3},
        {"hydra_sft__eval_every": 3},
        {"hydra_sft__max_eval_rows": 3},
        {"memory__budget": "1GiB"},
        {"memory__checkpointing": "layers"},
        {"ppo__micro_batch_tokens": 100},
        {"ppo__sampling__batch_rows": 2},
        {"evaluation__num_prompts": 5},
        {"ppo__num_steps": 200},
    ],
)
def test_what_changes_nothing_that_was_computed(change: dict[str, Any]):
    for past in (NOTHING, IN_STAGE1, IN_PPO):
        assert refused(past, **change) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"method": "ppo"}, "method: hydra-ppo -> ppo"),
        ({"lora__rank": 4}, "lora.rank: 16 -> 4"),
        ({"data__world_pairs": 7}, "data.world_pairs: 6000 -> 7"),
        ({"model__dtype": "bfloat16"}, "model.dtype: auto -> bfloat16"),
        ({"start__sft": "x"}, "start.sft: None -> x"),
        ({"runtime__num_threads": 2}, "runtime.num_threads: None -> 2"),
        ({"hydra_sft__learning_rate": 0.1}, "hydra_sft.learning_rate: None -> 0.1 (stage hydra_sft has begun with it)"),
    ],
)
def test_what_a_run_has_computed_with_stays(change: dict[str, Any], line: str):
    for past in (IN_STAGE1, IN_PPO, MEASURED):
        assert refused(past, **change) == [line]


def test_a_stage_that_has_not_begun_may_be_changed():
    for change in ({"ppo__kl_coef": 0.5}, {"ppo__sampling__top_k": 3}, {"ppo__schedule": "cosine"}):
        assert refused(IN_STAGE1, **change) == []
        (line,) = refused(IN_PPO, **change)
        assert line.endswith("(stage ppo has begun with it)")
    assert refused(IN_PPO, sft__learning_rate=0.1) == []  # a stage that this method has not
    # Without a reward model stage 1 trains another model.
    assert refused(IN_STAGE1, ppo__reward__reward_model_coef=0.5) == []
    (line,) = refused(IN_STAGE1, ppo__reward__reward_model_coef=0.0)
    assert line.endswith("(without a reward model stage 1 is another one)")


def test_preference_training_is_a_stage_like_others():
    dpo = {"method": "dpo"}
    begun = Past(begun=frozenset({"sft", "preference"}), done=frozenset({"sft"}), ppo_steps=0)
    assert refused(Past(begun=frozenset({"sft"}), done=frozenset(), ppo_steps=0), dpo, preference__dpo_beta=0.5) == []
    assert refused(begun, dpo, preference__save_every=7, ppo__sampling__top_k=3) == []
    (line,) = refused(begun, dpo, preference__dpo_beta=0.5)
    assert line.endswith("(stage preference has begun with it)")
    # How responses are drawn matters to what is measured, though there is no PPO.
    measured = Past(begun=begun.begun | {"evaluation"}, done=begun.begun, ppo_steps=0)
    (line,) = refused(measured, dpo, ppo__sampling__top_k=3)
    assert line.endswith("(the evaluation has begun with it)")


def test_the_evaluation_may_be_changed_until_it_is_done():
    (line,) = refused(MEASURED, evaluation__num_prompts=5)
    assert (
        line
        == "evaluation.num_prompts: 256 -> 5 (the run is measured already; measure it again with `hydra-rlhf eval`)"
    )


def test_the_number_of_steps():
    # Warm-up of 5 % of 100 steps is 5 of them, of 800 steps 40, of 801 steps 41.
    assert refused(IN_PPO, ppo__num_steps=800) == []
    (line,) = refused(IN_PPO, ppo__num_steps=801)
    assert "ppo.num_steps: 100 -> 801 (learning rates rise for 41 steps with it, and 40 are done" in line
    assert refused(IN_PPO, ppo__num_steps=801, ppo__warmup_frac=0.04) == []
    assert refused(IN_PPO, ppo__num_steps=40) == []
    (line,) = refused(IN_PPO, ppo__num_steps=39)
    assert "40 steps are done" in line
    for schedule in ("linear", "cosine"):
        (line,) = refused(IN_PPO, {"ppo__schedule": schedule}, ppo__num_steps=200)
        assert "every learning rate depends on it" in line
    # The run's own warm-up is not over: its rates depend on how many steps there were to be.
    early = Past(begun=IN_PPO.begun, done=IN_PPO.done, ppo_steps=4)
    assert len(refused(early, ppo__num_steps=20)) == 1
    assert refused(MEASURED, ppo__num_steps=200) == []


def test_every_refusal_is_told():
    assert len(refused(IN_PPO, seed=1, ppo__save_every=3, ppo__kl_coef=0.5)) == 2


def test_further_steps_open_a_finished_run_again():
    stages = {
        "hydra_sft": {"done": True, "metrics_bytes": 0},
        "ppo": {"done": True, "metrics_bytes": 7},
        "evaluation": {"done": True, "metrics_bytes": 9},
    }
    old, more = settings(), settings(ppo__num_steps=101)
    assert reopened(stages, old, more) == {
        "hydra_sft": stages["hydra_sft"],
        "ppo": {"done": False, "metrics_bytes": 7},
    }
    assert reopened(stages, old, settings(ppo__save_every=3)) == stages
    assert reopened({"hydra_sft": stages["hydra_sft"]}, old, more) == {"hydra_sft": stages["hydra_sft"]}


def test_every_rule_is_about_settings_that_exist():
    from fnmatch import fnmatchcase

    names = setting_names(Recipe)
    for rule in RULES:
        assert rule.why
        for pattern in rule.settings:
            assert any(fnmatchcase(name, pattern) for name in names), pattern
    assert "num_steps" in {field.name for field in fields(PPOConfig)}
