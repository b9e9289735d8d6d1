"""The memory plan of every method for one recipe, as data: what `hydra-rlhf plan` prints and `--json` writes."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from transformers.configuration_utils import PretrainedConfig

from hydra_rlhf.config import Recipe
from hydra_rlhf.memory.budget import PROCESS_BYTES, tensor_budget
from hydra_rlhf.memory.choose import MAX_MICRO_BATCH_TOKENS
from hydra_rlhf.memory.decide import (
    NO_CORRECTIONS,
    Decision,
    decide_method,
    decide_stage1,
    phases_of,
    planner_of,
    recipe_for,
    work_of_stage2,
    workload_of,
)
from hydra_rlhf.memory.plan import Cuts, peak, total
from hydra_rlhf.memory.remedy import find_remedy
from hydra_rlhf.model.device import choose_dtype, pick_device, with_dtype
from hydra_rlhf.model.roles import ROLES, STAGE2, RoleTable, method_table
from hydra_rlhf.model.shapes import find_config
from hydra_rlhf.model.trunk import text_config

LEARNING: Mapping[str, str] = {"ppo": "update", "preference": "preference"}
"""The phase of each kind of stage 2 that learns."""
FULL_SFT = "full SFT"
"""The row that every method is compared with: fine-tuning all weights on demonstrations."""


def plan_methods(
    recipe: Recipe,
    methods: tuple[str, ...] = tuple(ROLES),
    corrections: Mapping[str, float] = NO_CORRECTIONS,
    *,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Plans of these methods and of full SFT within the recipe's budget, JSON-ready. Raises `ModelError`.

    Reads the model's config and no weight. Methods that do not fit say what would make them. `corrections` are measured
    over planned bytes per phase, from a probe.
    """
    dtype, dtype_why = choose_dtype(recipe.model)
    recipe = replace(recipe, model=with_dtype(recipe.model))
    config = find_config(recipe.model, trust_remote_code=trust_remote_code)
    budget = budget_of(recipe)
    rows = {method: plan_method(recipe_for(recipe, method), config, budget, corrections) for method in methods}
    return {
        "model": recipe.model.path,
        "dtype": dtype,
        "dtype_why": dtype_why,
        "quantization": recipe.model.quantization,
        "num_layers": text_config(config).num_hidden_layers,
        "lora": {"rank": recipe.lora.rank, "targets": list(recipe.lora.targets), "dtype": recipe.lora.dtype},
        "budget": recipe.memory.budget,
        "tensor_budget": budget,
        "process_bytes": 0 if recipe.memory.budget == "auto" else PROCESS_BYTES,
        "corrections": dict(corrections),
        "workload": asdict(workload_of(recipe)),
        "methods": rows,
        "full_sft": plan_full_sft(recipe, config, budget, corrections),
    }


def budget_of(recipe: Recipe) -> int:
    """Bytes that tensors may take on the recipe's device, or on the one it names in `memory.budget`."""
    device = torch.device("cpu") if recipe.memory.budget != "auto" else pick_device(recipe.model.device)
    return tensor_budget(recipe.memory, device)


def plan_method(
    recipe: Recipe, config: PretrainedConfig, budget: int, corrections: Mapping[str, float]
) -> dict[str, Any]:
    """One method: decisions per stage, bytes per phase, the largest sizes that fit, and a remedy where nothing does."""
    table = method_table(recipe)
    decisions = decide_method(recipe, config, table, budget, corrections)
    phases = phases_of(decisions)
    fits = all(decision.fits for decision in decisions.values())
    stage2 = STAGE2[recipe.method]
    plan: dict[str, Any] = {
        "fits": fits,
        "stage2": stage2,
        "peak": peak(phases),
        "peak_phase": max(phases, key=lambda name: total(phases[name])),
        "phases": {name: dict(parts) for name, parts in phases.items()},
        "stages": {stage: decision.as_dict() for stage, decision in decisions.items()},
    }
    if fits:
        plan["largest"] = largest_sizes(recipe, config, table, budget, decisions[stage2], corrections)
    else:
        plan["remedy"] = find_remedy(recipe, config, table, budget, corrections)
    return plan


def plan_full_sft(
    recipe: Recipe, config: PretrainedConfig, budget: int, corrections: Mapping[str, float]
) -> dict[str, Any]:
    """Fine-tuning all weights on demonstrations, with the recipe's SFT settings."""
    recipe = replace(recipe, model=replace(recipe.model, quantization="none"))
    work = replace(workload_of(recipe), batch_size=recipe.sft.batch_size)
    planner = planner_of(recipe, config, work, optimizer=recipe.sft.optimizer, corrections=corrections)
    return decide_stage1(planner, recipe, "sft", budget, lora=False).as_dict()


def largest_sizes(
    recipe: Recipe,
    config: PretrainedConfig,
    table: RoleTable,
    budget: int,
    decision: Decision,
    corrections: Mapping[str, float],
) -> dict[str, int]:
    """The most rows decoded together, and the largest micro-batches without and with all layers checkpointed.

    A rollout batch may be larger than what is decoded together: it is then sampled in row groups.
    """
    stage2 = STAGE2[recipe.method]
    optimizer = getattr(recipe, stage2).optimizer
    planner = planner_of(recipe, config, workload_of(recipe), optimizer=optimizer, corrections=corrections)
    num_layers, cuts = planner.simulation.num_layers, replace(decision.chosen.cuts, kept_graphs=1)
    tokens_each = work_of_stage2(planner, recipe, table).tokens_each
    most = max(1, MAX_MICRO_BATCH_TOKENS * 16 // tokens_each)
    work = replace(planner.workload, num_sequences=most, minibatch_size=most, batch_size=most)
    wide = work_of_stage2(replace(planner, workload=work), recipe, table)

    def fits(phase: str, cuts: Cuts) -> bool:
        return total(wide.plan(cuts)[phase]) <= budget

    def micro_batch(layers: int) -> int:
        changed = replace(cuts, checkpointed_layers=layers)
        return tokens_each * largest(
            lambda rows: fits(LEARNING[stage2], replace(changed, micro_batch_tokens=rows * tokens_each)), most
        )

    return {
        "rollout_rows": largest(lambda rows: fits("rollout", replace(cuts, rollout_rows=rows)), 4096),
        "micro_batch_tokens": micro_batch(0),
        "micro_batch_tokens_checkpointed": micro_batch(num_layers),
    }


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, 0 if 1 does not; beyond one that does not, none does."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
