"""`plan --probe`: one measured step, and what the plan makes of it."""

import pytest

from hydra_rlhf.config import LoraConfig, MemoryConfig, ModelConfig, Recipe
from hydra_rlhf.memory.report import plan_methods
from hydra_rlhf.stages.probe_step import probe_step

TINY = ModelConfig(path="scratch:tiny", scratch_vocab_size=4096)
LARGE_HEAD = ModelConfig(path="scratch:small", scratch_vocab_size=16_000)


@pytest.mark.parametrize(("method", "model"), [("hydra-ppo", TINY), ("ppo", LARGE_HEAD)])
def test_a_step_needs_what_was_planned(method: str, model: ModelConfig):
    # A tied head that is larger than all that is kept, trained whole: its gradient must not count twice.
    recipe = Recipe(name="probe", method=method, model=model, lora=LoraConfig(rank=4))  # pyright: ignore
    corrections = probe_step(recipe)
    assert list(corrections) == ["rollout", "score", "update"]
    assert all(0.85 < factor < 1.2 for factor in corrections.values()), corrections


def test_corrections_scale_activations_and_nothing_else():
    recipe = Recipe(name="probe", model=TINY, memory=MemoryConfig(budget="4GiB"))
    plain, corrected = (
        plan_methods(recipe, ("hydra-ppo",), corrections) for corrections in ({}, {"rollout": 3.0, "update": 2.0})
    )
    assert corrected["corrections"] == {"rollout": 3.0, "update": 2.0}
    before, after = (plan["methods"]["hydra-ppo"]["phases"] for plan in (plain, corrected))
    assert after["score"] == before["score"]
    for phase, factor in (("rollout", 3), ("update", 2)):
        changed = {part for part in before[phase] if before[phase][part] != after[phase][part]}
        assert changed == {"activations"}
        assert after[phase]["activations"] == pytest.approx(factor * before[phase]["activations"], rel=1e-3)
    most = [plan["methods"]["hydra-ppo"]["largest"] for plan in (plain, corrected)]
    assert most[0]["micro_batch_tokens"] > most[1]["micro_batch_tokens"]
    assert most[0]["rollout_rows"] > most[1]["rollout_rows"]
