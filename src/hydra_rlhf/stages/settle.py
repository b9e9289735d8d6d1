"""Take a stage's limits from the memory plan: decided once from what the stage really works on, and kept in the run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from hydra_rlhf.config import (
    HydraSFTConfig,
    MemoryConfig,
    ModelConfig,
    PPOConfig,
    PreferenceConfig,
    Recipe,
)
from hydra_rlhf.config_checks import parse_bytes
from hydra_rlhf.data.formats import TokenizedPrompt
from hydra_rlhf.errors import ConfigError
from hydra_rlhf.memory.budget import tensor_budget
from hydra_rlhf.memory.decide import (
    Decision,
    decide_stage1,
    decide_stage2,
    planner_of,
    recipe_for,
    work_of_stage2,
    workload_of,
)
from hydra_rlhf.memory.measure import count_tensor_bytes
from hydra_rlhf.memory.plan import Cuts, Phases, Workload
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.roles import (
    ROLES,
    STAGE1_ORDER,
    STAGE1_TABLES,
    STAGE2,
    methods_with,
    rows_in_use,
    stage1_models,
)
from hydra_rlhf.runtime.run import Run
from hydra_rlhf.stages.examples import Example, longest
from hydra_rlhf.stages.limits import StageLimits

PLAN_FILE = "memory_plan.json"
"""In the run folder: {stage: decision}; a resumed run takes its limits from it, whatever is free by then."""


def settle_ppo(recipe: Recipe, model: HydraModel, prompts: Sequence[TokenizedPrompt], run: Run | None) -> StageLimits:
    """Limits of stage 2, and its layers set to be recomputed as the plan says. Raises `ConfigError`: see `settle`."""
    work = workload_of(recipe)
    work = replace(work, prompt_tokens=max(len(prompt.prompt_ids) for prompt in prompts))
    return settle(recipe, model, "ppo", work, run)


def settle_supervised(
    recipe: Recipe, model: HydraModel, stage: str, examples: Sequence[Example], run: Run | None
) -> StageLimits:
    """Limits of a stage-1 model or of preference training, as `settle_ppo`."""
    prompt, response = longest(examples)
    work = replace(
        workload_of(recipe),
        prompt_tokens=prompt,
        data_response_tokens=response,
        batch_size=getattr(recipe, stage).batch_size,
    )
    return settle(recipe, model, stage, work, run)


def settle(recipe: Recipe, model: HydraModel, stage: str, work: Workload, run: Run | None) -> StageLimits:
    """Decide, or read what an earlier process of the run decided, and make the model follow it.

    Raises `ConfigError` where a named budget cannot be kept. With `memory.budget=auto` the smallest settings are tried.
    """
    known: dict[str, Any] = run.read_json(PLAN_FILE) if run is not None and (run.folder / PLAN_FILE).exists() else {}
    asked = asked_of(recipe, stage)
    if stage not in known or known[stage].get("asked") != asked:
        known[stage] = {"asked": asked, **decide(recipe, model, stage, work)}
        if run is not None:
            run.write_json(PLAN_FILE, known)
    chosen = known[stage]
    model.logit_tile_bytes = parse_bytes(recipe.memory.logit_tile)
    offload = offloads(recipe.memory, model)
    cuts = cuts_of(chosen)
    if cuts.checkpointed_layers:
        model.enable_checkpointing(cuts.checkpointed_layers, offload=offload)
    rows = cuts.rollout_rows if decodes(stage) else None
    return StageLimits(micro_batch_tokens=cuts.micro_batch_tokens, rollout_rows=rows, kept_graphs=cuts.kept_graphs)


def decodes(stage: str) -> bool:
    """Whether responses are sampled in a stage: in every stage 2."""
    return stage not in STAGE1_TABLES


def asked_of(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The settings that a decision was made for: a run that is resumed with others decides again."""
    rows = {"batch_rows": recipe.ppo.sampling.batch_rows} if decodes(stage) else {}
    memory = {name: getattr(recipe.memory, name) for name in ("budget", "checkpointing")}
    return {**memory, "micro_batch_tokens": getattr(recipe, stage).micro_batch_tokens, **rows}


def decide(recipe: Recipe, model: HydraModel, stage: str, work: Workload) -> dict[str, Any]:
    """The decision on one stage as it is kept: limits, planned bytes per phase, options, budget."""
    trunk = model.trunk(next(iter(model.trunks)))
    settings = getattr(recipe, stage)
    below_rank = trunk.below_rank
    if stage in STAGE1_TABLES and below_rank:  # a stage 1 that finds such a set goes on training it
        recipe, below_rank = replace(recipe, lora=replace(recipe.lora, rank=below_rank)), 0
    planner = planner_of(recipe, trunk.model.config, work, optimizer=settings.optimizer, below_rank=below_rank)
    held = count_tensor_bytes([*model.parameters(), *model.buffers()])
    budget = tensor_budget(recipe.memory, model.device, held=held)
    if stage in STAGE1_TABLES:
        decision = decide_stage1(planner, recipe, stage, budget, lora=settings.tuning == "lora")
    else:
        decision = decide_stage2(planner, recipe, model.table, budget)
    if not decision.fits and recipe.memory.budget != "auto":
        raise ConfigError(refusal(recipe, stage, decision))
    return decision.as_dict() | {"budget": budget, "workload": asdict(work)}


def plan_every_method(recipe: Recipe, model: HydraModel, decided: Mapping[str, Any]) -> dict[str, Phases]:
    """What each method with this run's kind of stage 2 would hold in each phase of it, cut as its own stages were:
    {method: phases}.

    `decided` is what `PLAN_FILE` holds. Stage 1 is left out where the run had none.
    """
    stage1 = next((decided[stage] for stage in STAGE1_ORDER if stage in decided), None)
    trunk = model.trunk(model.table["actor"].trunk)
    config = trunk.model.config
    planned: dict[str, Phases] = {}
    stage2 = STAGE2[recipe.method]
    for method in methods_with(stage2):
        table = ROLES[method]
        table = rows_in_use(table, with_reward="reward" in model.table, with_critic="critic" in model.table)
        other = recipe_for(recipe, method)
        phases: dict[str, Mapping[str, int]] = {}
        for stage in stage1_models(table) if stage1 is not None else ():
            settings = getattr(other, stage)
            known = decided.get(stage, stage1)
            work = replace(Workload(**known["workload"]), batch_size=settings.batch_size)
            planner = planner_of(other, config, work, optimizer=settings.optimizer, below_rank=0)
            lora = settings.tuning == "lora" or other.model.quantization != "none"
            phases[stage] = planner.stage1(stage, cuts_of(known), lora=lora)
        work = Workload(**decided[stage2]["workload"])
        below_rank = trunk.below_rank if other.model.quantization != "none" else 0
        optimizer = getattr(other, stage2).optimizer
        planner = planner_of(other, config, work, optimizer=optimizer, below_rank=below_rank)
        planned[method] = {**phases, **work_of_stage2(planner, other, table).plan(cuts_of(decided[stage2]))}
    return planned


def cuts_of(decision: Mapping[str, Any]) -> Cuts:
    """The settings of a decision that was kept; one that an older version left may lack some that have a default."""
    return Cuts(**{field.name: decision[field.name] for field in fields(Cuts) if field.name in decision})


def refusal(recipe: Recipe, stage: str, decision: Decision) -> str:
    """Why a stage cannot keep its budget, and what to do."""
    needed = decision.chosen.peak / 2**30
    return (
        f"memory.budget={recipe.memory.budget}: the stage {stage} needs {needed:.2f} GiB of tensors at least, besides "
        "about 0.44 GiB of the process; raise it, leave micro_batch_tokens, batch_rows and memory.checkpointing to the "
        "plan, or see what `hydra-rlhf plan` says would fit"
    )


def offloads(memory: MemoryConfig, model: HydraModel) -> bool:
    """`memory.offload`, which is for CUDA. Raises `ConfigError` elsewhere."""
    if memory.offload and model.device.type != "cuda":
        raise ConfigError(
            "memory.offload=true moves what is kept from a CUDA device to the host, but this run is on "
            f"{model.device.type}; remove it"
        )
    return memory.offload


def recipe_of(
    model: HydraModel,
    memory: MemoryConfig,
    *,
    method: str = "hydra-ppo",
    ppo: PPOConfig | None = None,
    hydra_sft: HydraSFTConfig | None = None,
    preference: PreferenceConfig | None = None,
) -> Recipe:
    """What the plan has to know of a model that is there without a recipe, and of the stage it is to go through."""
    trunk = model.trunk(next(iter(model.trunks)))
    quantization = trunk.quantized.quantization if trunk.quantized is not None else "none"
    dtype = str(trunk.dtype).removeprefix("torch.")
    base: Mapping[str, Any] = {"path": "in-memory", "dtype": dtype, "quantization": quantization}
    named: Mapping[str, Any] = {"name": "in-memory", "method": method}
    return Recipe(
        **named,
        model=ModelConfig(**base),
        lora=model.lora,
        memory=memory,
        ppo=ppo or PPOConfig(),
        hydra_sft=hydra_sft or HydraSFTConfig(),
        preference=preference or PreferenceConfig(),
    )
