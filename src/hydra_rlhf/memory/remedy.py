"""Which settings would make a method fit a budget."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers.configuration_utils import PretrainedConfig

from hydra_rlhf.config import Recipe
from hydra_rlhf.memory.budget import PROCESS_BYTES
from hydra_rlhf.memory.decide import decide_method, fits, phases_of, trains_adapters
from hydra_rlhf.memory.plan import peak
from hydra_rlhf.model.roles import STAGE2, RoleTable, method_table, stage1_models


@dataclass(frozen=True, slots=True)
class Remedy:
    """Something to set so that less memory is needed."""

    text: str
    """What to set."""
    change: Callable[[Recipe], Recipe]
    """The recipe with that set."""


def find_remedy(
    recipe: Recipe, config: PretrainedConfig, table: RoleTable, budget: int, corrections: Mapping[str, float]
) -> str:
    """The settings that would make a method fit, none of them needless, or that none of those known does."""

    def suffice(changes: list[Remedy]) -> bool:
        return fits(changed_by(changes, recipe), config, table, budget, corrections)

    steps, freeing = remedies(recipe), relaxed(recipe)
    attempts = [steps[:count] + more for count in range(len(steps) + 1) for more in ([], [freeing] if freeing else [])]
    changes = next((changes for changes in attempts if suffice(changes)), None)
    if changes is None:
        names = ", ".join(remedy.text for remedy in attempts[-1])
        with_all = f"with {names}" if names else "as it is"
        decisions = decide_method(changed_by(attempts[-1], recipe), config, table, budget, corrections)
        needs = budget_for(peak(phases_of(decisions)))
        return f"no setting makes it fit; {with_all} it needs a budget of {needs}"
    for remedy in list(changes):  # a later change may have made an earlier one needless
        without = [other for other in changes if other is not remedy]
        if without and suffice(without):
            changes = without
    return f"fits with {', '.join(remedy.text for remedy in changes)}"


def budget_for(num_bytes: int) -> str:
    """The least budget, as `memory.budget` takes it, in which tensors of so many bytes fit; rounded up."""
    whole = num_bytes + PROCESS_BYTES
    if whole < 2**30:
        return f"{math.ceil(whole / 2**20)}MiB"
    return f"{math.ceil(10 * whole / 2**30) / 10:.1f}GiB"


def changed_by(changes: Sequence[Remedy], recipe: Recipe) -> Recipe:
    """The recipe with all of these changes."""
    for remedy in changes:
        recipe = remedy.change(recipe)
    return recipe


def relaxed(recipe: Recipe) -> Remedy | None:
    """Leaving to the plan what a recipe says about cutting its work; None where it says nothing."""
    named = (*stage1_models(method_table(recipe)), STAGE2[recipe.method])
    stages = [stage for stage in named if getattr(recipe, stage).micro_batch_tokens is not None]
    said = [f"{stage}.micro_batch_tokens" for stage in stages]
    said += ["ppo.sampling.batch_rows"] if recipe.ppo.sampling.batch_rows is not None else []
    said += ["memory.checkpointing"] if recipe.memory.checkpointing == "none" else []

    def change(recipe: Recipe) -> Recipe:
        for stage in stages:
            recipe = replace(recipe, **{stage: replace(getattr(recipe, stage), micro_batch_tokens=None)})
        sampling = replace(recipe.ppo.sampling, batch_rows=None)
        checkpointing = "auto" if recipe.memory.checkpointing == "none" else recipe.memory.checkpointing
        memory = replace(recipe.memory, checkpointing=checkpointing)
        return replace(recipe, ppo=replace(recipe.ppo, sampling=sampling), memory=memory)

    return Remedy(f"{' and '.join(said)} left to the plan", change) if said else None


def remedies(recipe: Recipe) -> list[Remedy]:
    """Settings that a recipe does not have yet and that need less memory, those that change least first."""
    table = method_table(recipe)
    found: list[Remedy] = []
    if recipe.model.dtype == "float32":
        found.append(setting("model", dtype="bfloat16"))
    if recipe.model.quantization == "none":  # on a packed base stage 1 trains a LoRA set anyway
        trained = [stage for stage in stage1_models(table) if getattr(recipe.start, stage) is None]
        full = [stage for stage in trained if getattr(recipe, stage).tuning == "full"]
        found += [setting(stage, tuning="lora") for stage in full]
    if trains_adapters(table) and recipe.model.quantization != "nf4":
        found.append(setting("model", quantization="nf4"))
    stage2 = STAGE2[recipe.method]
    if getattr(recipe, stage2).optimizer == "adamw":
        found.append(setting(stage2, optimizer="adamw-8bit"))
    return found


def setting(section: str, **changes: Any) -> Remedy:
    """Another value of one setting."""
    ((name, value),) = changes.items()
    return Remedy(
        f"{section}.{name}={value}",
        lambda recipe: replace(recipe, **{section: replace(getattr(recipe, section), **changes)}),
    )
