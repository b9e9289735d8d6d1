"""From a recipe to the limits of its stages: what `hydra-rlhf plan` prints is what the trainer takes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from transformers.configuration_utils import PretrainedConfig

from hydra_rlhf.config import LoraConfig, ModelConfig, Recipe
from hydra_rlhf.config_checks import parse_bytes
from hydra_rlhf.memory.choose import Given, Option, Work, choose, fits_smallest
from hydra_rlhf.memory.count import BaseSizes, learning_passes
from hydra_rlhf.memory.plan import Cuts, Phases, Planner, Workload, total
from hydra_rlhf.memory.simulate import Simulation
from hydra_rlhf.memory.sizes import sizes_of
from hydra_rlhf.model.roles import (
    PAIR_READERS,
    STAGE1_TABLES,
    STAGE2,
    TRAINABLE_ROLES,
    RoleTable,
    method_table,
    stage1_models,
)

NO_CORRECTIONS: Mapping[str, float] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How a stage is cut to fit its budget."""

    chosen: Option
    """The cheapest option that fits, or the smallest there is."""
    fits: bool
    options: tuple[Option, ...]
    """All that were looked at."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "fits": self.fits,
            "peak": self.chosen.peak,
            "relative_time": self.chosen.relative_time,
            **cuts_dict(self.chosen.cuts),
            "phases": {name: dict(parts) for name, parts in self.chosen.phases.items()},
            "options": [{"peak": o.peak, "relative_time": o.relative_time, **cuts_dict(o.cuts)} for o in self.options],
        }


def cuts_dict(cuts: Cuts) -> dict[str, int]:
    """The settings of an option."""
    return {
        "micro_batch_tokens": cuts.micro_batch_tokens,
        "rollout_rows": cuts.rollout_rows,
        "checkpointed_layers": cuts.checkpointed_layers,
        "kept_graphs": cuts.kept_graphs,
    }


def workload_of(recipe: Recipe) -> Workload:
    """The most that one step of a recipe's stages works on, by its settings."""
    ppo = recipe.ppo
    return Workload(
        prompt_tokens=recipe.data.max_prompt_tokens,
        response_tokens=ppo.sampling.max_response_tokens,
        data_response_tokens=recipe.data.max_response_tokens,
        num_sequences=ppo.rollout_batch_size * ppo.samples_per_prompt,
        minibatch_size=ppo.minibatch_size,
        batch_size=recipe.hydra_sft.batch_size,
        num_held_out=recipe.preference.num_eval_prompts,
        entropy_gradient=ppo.entropy_coef > 0,
    )


def planner_of(
    recipe: Recipe,
    config: PretrainedConfig,
    workload: Workload,
    *,
    optimizer: str,
    below_rank: int | None = None,
    corrections: Mapping[str, float] = NO_CORRECTIONS,
) -> Planner:
    """A planner for one stage's optimizer on the base of a recipe.

    `below_rank` is that of the LoRA set that stage 1 left under the others, 0 = none (default: the recipe's rank where
    the base is quantised); `corrections` are what a probe found (see `Simulation`).
    """
    left = recipe.lora.rank if recipe.model.quantization != "none" else 0
    base = _Base(
        config_json=config.to_json_string(use_diff=False),
        config=config,
        model=recipe.model,
        lora=recipe.lora,
        tile_bytes=parse_bytes(recipe.memory.logit_tile),
        below_rank=left if below_rank is None else below_rank,
        temperature=recipe.ppo.sampling.temperature,
        corrections=tuple(corrections.items()),
    )
    return Planner(_simulation(base), _sizes(base, optimizer), workload)


def decide_stage2(planner: Planner, recipe: Recipe, table: RoleTable, budget: int) -> Decision:
    """Limits of stage 2 within `budget` bytes of tensors."""
    return decide(work_of_stage2(planner, recipe, table), budget)


def decide_stage1(planner: Planner, recipe: Recipe, stage: str, budget: int, *, lora: bool) -> Decision:
    """Limits of a stage-1 model within `budget` bytes of tensors."""
    return decide(work_of_stage1(planner, recipe, stage, lora=lora), budget)


def decide(work: Work, budget: int) -> Decision:
    """Limits of one stage."""
    found, options = choose(work, budget)
    return Decision(chosen=found or smallest(options), fits=found is not None, options=tuple(options))


def work_of_ppo(planner: Planner, recipe: Recipe, table: RoleTable) -> Work:
    """What stage 2 has to cut."""
    work, ppo = planner.workload, recipe.ppo
    given = Given(
        micro_batch_tokens=ppo.micro_batch_tokens,
        rollout_rows=ppo.sampling.batch_rows,
        checkpointed_layers=given_layers(recipe, planner.simulation.num_layers),
    )
    return Work(
        plan=lambda cuts: planner.ppo(table, cuts),
        given=given,
        num_layers=planner.simulation.num_layers,
        num_sequences=work.num_sequences,
        tokens_each=work.prompt_tokens + work.response_tokens,
        held=total(planner.held_stage2(table)),
        keeps_graphs=ppo.scoring == "auto"
        and ppo.single_pass
        and any(len(roles) > 1 for roles in learning_passes(table).values()),
    )


def work_of_preference(planner: Planner, recipe: Recipe, table: RoleTable) -> Work:
    """What preference training has to cut: pairs, and the held-out prompts that are answered together."""
    work, readers = planner.workload, PAIR_READERS[recipe.method]
    given = Given(
        micro_batch_tokens=recipe.preference.micro_batch_tokens,
        rollout_rows=recipe.ppo.sampling.batch_rows,
        checkpointed_layers=given_layers(recipe, planner.simulation.num_layers),
    )
    return Work(
        plan=lambda cuts: planner.preference(table, readers, cuts),
        given=given,
        num_layers=planner.simulation.num_layers,
        num_sequences=work.batch_size,
        tokens_each=2 * (work.prompt_tokens + work.data_response_tokens),
        num_decoded=work.num_held_out,
        held=total(planner.held_stage2(table)),
    )


WORKS: Mapping[str, Callable[[Planner, Recipe, RoleTable], Work]] = {
    "ppo": work_of_ppo,
    "preference": work_of_preference,
}
"""What each kind of stage 2 has to cut."""


def work_of_stage2(planner: Planner, recipe: Recipe, table: RoleTable) -> Work:
    """What stage 2 of the recipe's method has to cut."""
    return WORKS[STAGE2[recipe.method]](planner, recipe, table)


def work_of_stage1(planner: Planner, recipe: Recipe, stage: str, *, lora: bool) -> Work:
    """What a stage-1 model has to cut."""
    work = planner.workload
    rows = 2 if "reward" in STAGE1_TABLES[stage] else 1
    given = Given(
        micro_batch_tokens=getattr(recipe, stage).micro_batch_tokens,
        rollout_rows=1,
        checkpointed_layers=given_layers(recipe, planner.simulation.num_layers),
    )
    return Work(
        plan=lambda cuts: {stage: planner.stage1(stage, cuts, lora=lora)},
        given=given,
        num_layers=planner.simulation.num_layers,
        num_sequences=work.batch_size,
        tokens_each=rows * (work.prompt_tokens + work.data_response_tokens),
        held=total(planner.held_stage1(stage, lora)),
    )


def decide_method(
    recipe: Recipe,
    config: PretrainedConfig,
    table: RoleTable,
    budget: int,
    corrections: Mapping[str, float] = NO_CORRECTIONS,
) -> Mapping[str, Decision]:
    """Every stage that a method has to go through: {stage-1 model, `ppo` or `preference`: decision}."""
    works = works_of(recipe, config, table, corrections)
    return {stage: decide(work, budget) for stage, work in works.items()}


def fits(
    recipe: Recipe, config: PretrainedConfig, table: RoleTable, budget: int, corrections: Mapping[str, float]
) -> bool:
    """Whether `decide_method` finds limits for every stage; most often told without all its options."""
    works = works_of(recipe, config, table, corrections).values()
    if any(work.held > budget for work in works):
        return False
    return all(fits_smallest(work, budget) or decide(work, budget).fits for work in works)


def works_of(
    recipe: Recipe, config: PretrainedConfig, table: RoleTable, corrections: Mapping[str, float]
) -> Mapping[str, Work]:
    """What each stage that a method has to go through has to cut, in order."""
    workload = workload_of(recipe)
    works: dict[str, Work] = {}
    for stage in stage1_models(table):
        if getattr(recipe.start, stage) is not None:
            continue  # given, not trained
        settings = getattr(recipe, stage)
        planner = planner_of(
            recipe,
            config,
            replace(workload, batch_size=settings.batch_size),
            optimizer=settings.optimizer,
            below_rank=0,
            corrections=corrections,
        )
        lora = settings.tuning == "lora" or recipe.model.quantization != "none"
        works[stage] = work_of_stage1(planner, recipe, stage, lora=lora)
    stage2 = STAGE2[recipe.method]
    workload = replace(workload, batch_size=recipe.preference.batch_size)
    optimizer = getattr(recipe, stage2).optimizer
    planner = planner_of(recipe, config, workload, optimizer=optimizer, corrections=corrections)
    works[stage2] = work_of_stage2(planner, recipe, table)
    return works


def phases_of(decisions: Mapping[str, Decision]) -> Phases:
    """All phases of a method's pipeline, in order."""
    return {name: parts for decision in decisions.values() for name, parts in decision.chosen.phases.items()}


def given_layers(recipe: Recipe, num_layers: int) -> int | None:
    """Checkpointed layers where the recipe names a policy."""
    return {"none": 0, "layers": num_layers, "auto": None}[recipe.memory.checkpointing]


def smallest(options: list[Option]) -> Option:
    """The option that needs least."""
    return min(options, key=lambda option: option.peak)


def recipe_for(recipe: Recipe, method: str) -> Recipe:
    """The recipe with another method; one that trains whole trunks does without a quantised base."""
    recipe = replace(recipe, method=method)
    if not trains_adapters(method_table(recipe)):
        recipe = replace(recipe, model=replace(recipe.model, quantization="none"))
    return recipe


def trains_adapters(table: RoleTable) -> bool:
    """Whether all that learns in stage 2 is a LoRA set."""
    return all(table[role].adapter is not None for role in TRAINABLE_ROLES if role in table)


@dataclass(frozen=True, slots=True)
class _Base:
    """What a simulation depends on; equal ones are run once in a process."""

    config_json: str
    config: PretrainedConfig = field(compare=False)
    model: ModelConfig
    lora: LoraConfig
    tile_bytes: int
    below_rank: int
    temperature: float
    corrections: tuple[tuple[str, float], ...]


@lru_cache(maxsize=16)
def _simulation(base: _Base) -> Simulation:
    return Simulation(
        base.config,
        base.model,
        base.lora,
        base.tile_bytes,
        base.temperature,
        dict(base.corrections),
        below_rank=base.below_rank,
    )


@lru_cache(maxsize=32)
def _sizes(base: _Base, optimizer: str) -> BaseSizes:
    return sizes_of(_simulation(base).whole, base.lora, optimizer=optimizer, below_rank=base.below_rank)
