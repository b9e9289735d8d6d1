"""Methods on this machine: memory at an equal batch, and time per sample at an equal memory budget; data, no printing.

A method that the memory plan does not let run is planned only, and says so.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers.configuration_utils import PretrainedConfig

from hydra_rlhf.benchmark.machine import Machine, this_machine
from hydra_rlhf.benchmark.measure import Measured, machine_settings, measure_method
from hydra_rlhf.benchmark.subject import check_bench, num_sequences, sizes_for_work, with_batch
from hydra_rlhf.benchmark.work import Batch, Bound, Work, bound, step_work
from hydra_rlhf.config import Recipe
from hydra_rlhf.config_checks import compares_with_greedy
from hydra_rlhf.errors import OutOfMemoryError
from hydra_rlhf.memory.decide import Decision, decide_stage2, planner_of, recipe_for, workload_of
from hydra_rlhf.memory.report import budget_of, largest
from hydra_rlhf.model.device import choose_dtype, dtype_of, pick_device
from hydra_rlhf.model.roles import method_table
from hydra_rlhf.model.shapes import find_config, meta_trunk
from hydra_rlhf.runtime.environment import describe_environment

BATCH, BUDGET = "batch", "budget"
COMPARISONS = (BATCH, BUDGET)
"""What is held equal: the sequences per PPO step, or the memory."""
MEASURED, PLANNED, OUT_OF_MEMORY = "measured", "planned", "out-of-memory"
"""Status of a row: run, not run because the plan says that it does not fit, run until memory ended."""


@dataclass(frozen=True)
class Bench:
    """Everything that all rows of one benchmark share."""

    recipe: Recipe
    """Model, lengths, batch, number of steps; its method is one of many."""
    watch: bool
    """Count every tensor in one further step where no allocator does."""
    max_batch: int
    """Most sequences that are tried to fit a budget."""

    @cached_property
    def config(self) -> PretrainedConfig:
        """Of the model."""
        return find_config(self.recipe.model)

    @cached_property
    def budget(self) -> int:
        """Bytes that tensors may take: as named, or most of what is free now."""
        return budget_of(self.recipe)

    @cached_property
    def machine(self) -> Machine:
        """Rates of the device in the dtype of the model."""
        return this_machine(pick_device(self.recipe.model.device), dtype_of(self.recipe.model))


def run_bench(bench: Bench, methods: Sequence[str], compare: Sequence[str]) -> dict[str, Any]:
    """All rows of the chosen comparisons, with what they were measured on; JSON-ready."""
    check_bench(bench.recipe)
    with machine_settings(bench.recipe.runtime):
        result = describe(bench)
        rows = list(equal_batch(bench, methods)) if BATCH in compare else []
        if BUDGET not in compare:
            return result | {"equal_batch": rows, "equal_budget": [], "shared_budget_bytes": None}
        budget = shared_budget(bench, methods)
        return result | {
            "equal_batch": rows,
            "equal_budget": list(equal_budget(bench, methods, budget, known=rows)),
            "shared_budget_bytes": budget,
        }


def describe(bench: Bench) -> dict[str, Any]:
    """Model, workload, machine and what else runs on it."""
    recipe = bench.recipe
    dtype, dtype_why = choose_dtype(recipe.model)
    return {
        "model": recipe.model.path,
        "dtype": dtype,
        "dtype_why": dtype_why,
        "quantization": recipe.model.quantization,
        "device": device_name(pick_device(recipe.model.device)),
        "lora": {"rank": recipe.lora.rank, "targets": list(recipe.lora.targets), "dtype": recipe.lora.dtype},
        "checkpointing": recipe.memory.checkpointing,
        "workload": asdict(workload_of(recipe)) | {"prompts": recipe.data.prompts},
        "num_epochs": recipe.ppo.num_epochs,
        "advantage_estimator": recipe.ppo.advantage_estimator,
        "samples_per_prompt": recipe.ppo.samples_per_prompt,
        "iterations": recipe.ppo.num_steps,
        "budget": recipe.memory.budget,
        "budget_bytes": bench.budget,
        "load_average_before": os.getloadavg(),
        "environment": describe_environment(),
        "machine": asdict(bench.machine),
    }


def device_name(device: torch.device) -> str:
    """`cpu`, or what the GPU is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def equal_batch(bench: Bench, methods: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Each method with the recipe's batch, cut as the plan says; one that does not fit `bench.budget` is planned."""
    for method in methods:
        recipe = recipe_for(bench.recipe, method)
        yield run_row(bench, recipe, decide(bench, recipe, bench.budget))


def equal_budget(
    bench: Bench, methods: Sequence[str], budget: int, *, known: Sequence[dict[str, Any]] = ()
) -> Iterator[dict[str, Any]]:
    """Each method with the largest batch that the plan fits into `budget` bytes of tensors, decoded all together.

    A row of `known` that was measured with the same batch and the same cuts stands for itself here too.
    """
    each = bench.recipe.ppo.samples_per_prompt
    for method in methods:
        size = largest_batch(bench, method, budget)
        recipe = decoded_together(recipe_for(bench.recipe, method), size or each)
        decision = decide(bench, recipe, budget)
        planned = plan_row(recipe, decision)
        same = next((row for row in known if row["status"] == MEASURED and is_same_run(row, planned)), None)
        row = run_row(bench, recipe, decision) if same is None else same
        yield row | {"batch_is_capped": size + each > bench.max_batch}


def largest_batch(bench: Bench, method: str, budget: int) -> int:
    """The most sequences that the plan fits into `budget`, all decoded together; 0 where one prompt's do not fit."""
    recipe, each = recipe_for(bench.recipe, method), bench.recipe.ppo.samples_per_prompt

    def fits(num_prompts: int) -> bool:
        return decide(bench, decoded_together(recipe, num_prompts * each), budget).fits

    return each * largest(fits, bench.max_batch // each)


def shared_budget(bench: Bench, methods: Sequence[str]) -> int:
    """The budget that methods are compared at: as named, else what the neediest that fits needs at the equal batch."""
    if bench.recipe.memory.budget != "auto":
        return bench.budget
    decisions = [decide(bench, recipe_for(bench.recipe, method), bench.budget) for method in methods]
    return max((decision.chosen.peak for decision in decisions if decision.fits), default=bench.budget)


def decoded_together(recipe: Recipe, num_sequences: int) -> Recipe:
    """The recipe with so many sequences, in one row group."""
    recipe = with_batch(recipe, num_sequences)
    sampling = replace(recipe.ppo.sampling, batch_rows=num_sequences)
    return replace(recipe, ppo=replace(recipe.ppo, sampling=sampling))


def decide(bench: Bench, recipe: Recipe, budget: int) -> Decision:
    """How the recipe's PPO is cut to fit `budget`; no stage 1 was run, so no LoRA set of one is there."""
    planner = planner_of(recipe, bench.config, workload_of(recipe), optimizer=recipe.ppo.optimizer, below_rank=0)
    return decide_stage2(planner, recipe, method_table(recipe), budget)


def is_same_run(row: dict[str, Any], planned: dict[str, Any]) -> bool:
    """Whether a row was cut exactly as another one is planned to be."""
    keys = ("method", "batch", "micro_batch_tokens", "rollout_rows", "checkpointed_layers", "kept_graphs")
    return all(row[key] == planned[key] for key in keys)


def run_row(bench: Bench, recipe: Recipe, decision: Decision) -> dict[str, Any]:
    """A row, measured where the plan says that it fits."""
    row = plan_row(recipe, decision)
    if not decision.fits:
        return row
    try:
        measured = measure_method(recipe, decision.chosen.cuts, watch=bench.watch)
    except (OutOfMemoryError, torch.OutOfMemoryError) as error:
        return row | {"status": OUT_OF_MEMORY, "error": str(error).splitlines()[0]}
    return row | {"status": MEASURED} | measured_row(bench, recipe, measured)


def plan_row(recipe: Recipe, decision: Decision) -> dict[str, Any]:
    """What is known of a row before anything runs; keys of what is measured are there and empty."""
    return {
        "method": recipe.method,
        "status": PLANNED,
        "batch": num_sequences(recipe),
        **asdict(decision.chosen.cuts),
        "planned_bytes": decision.chosen.peak,
        "planned_phases": {name: dict(parts) for name, parts in decision.chosen.phases.items()},
        "measured_bytes": None,
        "measured_phases": {},
        "time": None,
    }


def measured_row(bench: Bench, recipe: Recipe, measured: Measured) -> dict[str, Any]:
    """What the steps of a row came to: bytes, seconds per sample, rates, and how near the machine's limits that is."""
    size, times = num_sequences(recipe), measured.times
    batch = Batch(
        num_sequences=size,
        prompt_tokens=measured.prompt_tokens,
        response_tokens=measured.response_tokens,
        num_epochs=recipe.ppo.num_epochs,
        num_greedy=recipe.ppo.rollout_batch_size if compares_with_greedy(recipe.ppo) else 0,
    )
    trunk = meta_trunk(bench.config, recipe.model)
    work = step_work(method_table(recipe), sizes_for_work(bench.config, trunk, recipe.lora), batch)
    least = bound(work, bandwidth=bench.machine.bandwidth, matrix_rate=bench.machine.matrix_rate)
    return {
        "measured_bytes": max(measured.phase_bytes.values(), default=None),
        "measured_phases": measured.phase_bytes,
        "weight_bytes": measured.weight_bytes,
        "prompt_tokens": measured.prompt_tokens,
        "response_tokens": measured.response_tokens,
        "num_retries": measured.num_retries,
        "steps": measured.steps,
        "time": per_sample(times, size),
        "tokens_per_s": batch.num_tokens / times["step_s"],
        "generated_tokens_per_s": batch.num_response_tokens / times["generate_s"],
        "shares": shares(work, least, times, bench.machine),
        "bound": per_sample(asdict(least) | {"step_s": least.step_s}, size),
    }


def per_sample(seconds: dict[str, float], num_sequences: int) -> dict[str, float]:
    """Seconds of a step as seconds per sequence; `s_per_sample` is the whole step's."""
    each = {name: value / num_sequences for name, value in seconds.items()}
    return {"s_per_sample": each.pop("step_s"), **each}


def shares(work: Work, least: Bound, times: dict[str, float], machine: Machine) -> dict[str, float]:
    """How much of what the machine can do was put to use, each between 0 and about 1.

    `generate_bandwidth`: bytes that decoding must read, of those that could be read meanwhile. `generate_matrix` and
    `learn_matrix`: operations that are needed, of those that could be done meanwhile; learning is scoring and updating.
    `bound`: the least time of a step, of the time it took.
    """
    learn_s = times["score_s"] + times["update_s"]
    return {
        "generate_bandwidth": work.decode_bytes / (times["generate_s"] * machine.bandwidth),
        "generate_matrix": (work.decode_flops + work.prefill_flops) / (times["generate_s"] * machine.matrix_rate),
        "learn_matrix": work.learn_flops / (learn_s * machine.matrix_rate),
        "bound": least.step_s / times["step_s"],
    }
