"""What a run ends with: the trained policy in formats others load, and the before/after numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_rlhf.config import OptimizerConfig, Recipe
from hydra_rlhf.data.check import longer_wins
from hydra_rlhf.data.formats import ChatFormat
from hydra_rlhf.errors import CheckpointError
from hydra_rlhf.evaluation.generations import compare_with_reference, respond_with_both
from hydra_rlhf.evaluation.preferences import read_pairs, reward_numbers
from hydra_rlhf.evaluation.statistics import win_rate
from hydra_rlhf.memory.count import BaseSizes, count_all
from hydra_rlhf.memory.sizes import sizes_of
from hydra_rlhf.model.export import save_peft_adapter, save_scalar_head
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.roles import STAGE2, TRAINABLE_ROLES
from hydra_rlhf.records import Rollout
from hydra_rlhf.runtime.measure import peak_rss_bytes
from hydra_rlhf.runtime.run import Run
from hydra_rlhf.stages.datasets import Datasets, RawData, prompt_texts
from hydra_rlhf.stages.limits import StageLimits
from hydra_rlhf.stages.ppo_state import moments_of
from hydra_rlhf.stages.sample_records import role_numbers, sample_record
from hydra_rlhf.stages.scoring.reward_sources import Scoring, SourceMoments, with_moments
from hydra_rlhf.stages.session import Session
from hydra_rlhf.stages.settle import PLAN_FILE, plan_every_method


def save_policy(model: HydraModel, folder: Path) -> None:
    """Write what stage 2 trained: a PEFT folder per LoRA set (`actor/`, `critic/`), or a transformers folder per trunk
    that was trained whole; value_head.safetensors; the tokenizer with the actor."""
    for name in TRAINABLE_ROLES:
        if name not in model.table:
            continue
        role = model.table[name]
        trunk = model.trunk(role.trunk)
        if role.adapter is None:
            trunk.save(folder / name)
        elif role.adapter == name:  # a shared LoRA set is written once, under the actor's name
            save_peft_adapter(trunk, role.adapter, folder / name)
        if role.head == "value":
            save_scalar_head(model.scalar_head(role.trunk, role.head), folder / "value_head.safetensors")
    model.tokenizer.save_pretrained(folder / "actor")


def evaluate_run(
    session: Session,
    run: Run,
    model: HydraModel,
    chat: ChatFormat,
    data: Datasets,
    raw: RawData,
    *,
    reward_fn: Scoring | None,
) -> None:
    """Measure a finished stage 2 on held-out data; writes summary.json, memory.json and samples, and marks the stage.

    `record_costs` adds seconds and measured bytes to both files.
    """
    recipe = run.recipe
    session.begin("evaluation")
    step, checkpoint, limits, moments = load_trained(run, model, recipe.evaluation.checkpoint)
    with session.memory.phase("evaluation"):
        measured = measure(
            recipe,
            model,
            chat,
            data,
            raw,
            checkpoint=checkpoint,
            num_prompts=recipe.evaluation.num_prompts,
            reward_fn=with_moments(reward_fn, moments),
            limits=limits,
            after_token=session.stop.check,
        )
    summary = measured.summary
    for sample in measured.samples:
        session.log_sample({"stage": "evaluation", "step": step, "kind": "evaluation", **sample})
    scored = {} if summary["score_mean"] is None else {"eval/score": summary["score_mean"]}
    session.log("evaluation", step, {**scored, "eval/kl": summary["kl"]})
    run.write_json("summary.json", summary)
    settings: OptimizerConfig = getattr(recipe, STAGE2[recipe.method])
    counted = count_all(model.table, base_sizes(model, optimizer=settings.optimizer), dtype=recipe.model.dtype)
    decided = run.read_json(PLAN_FILE)
    planned = plan_every_method(recipe, model, decided)
    run.write_json("memory.json", counted | {"plan": planned, "decisions": decided})
    run.finish_stage("evaluation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What an evaluation found."""

    summary: dict[str, Any]
    """The numbers of summary.json."""
    samples: list[dict[str, Any]]
    """Pairs of responses to be shown."""
    actor: Rollout
    """The actor's responses to the held-out prompts."""
    reference: Rollout
    """The reference's responses to the same."""


def measure(
    recipe: Recipe,
    model: HydraModel,
    chat: ChatFormat,
    data: Datasets,
    raw: RawData,
    *,
    checkpoint: str,
    num_prompts: int,
    reward_fn: Scoring | None,
    limits: StageLimits,
    after_token: Callable[[], None] = lambda: None,
) -> Measurement:
    """The numbers of summary.json, samples, and the responses they are of: the fit of the LoRA-off roles, and actor
    against reference."""
    roles = [role for role in ("reference", "reward") if role in model.table]
    fit = read_pairs(model, data.test_pairs, roles, limits=limits)
    actor, reference = respond_with_both(
        model,
        chat,
        data.test_prompts[:num_prompts],
        recipe.ppo,
        seed=recipe.seed,
        reward_fn=reward_fn,
        limits=limits,
        after_token=after_token,
    )
    stop_ids = model.stop_ids(recipe.ppo.sampling.stop_token_ids)
    numbers, samples = compare_with_reference(
        actor,
        reference,
        gold=raw.gold,
        num_samples=recipe.evaluation.num_samples,
        seed=recipe.seed,
        record=lambda rollout, row: sample_record(chat, stop_ids, rollout, row, role_numbers(rollout, model.table)),
    )
    summary = {
        "name": recipe.name,
        "method": recipe.method,
        "seed": recipe.seed,
        "checkpoint": checkpoint,
        **numbers,
        "perplexity": fit.perplexity,
        "longer_wins_accuracy": longer_wins(raw.test.rows),
        "gold_accuracy": gold_accuracy(raw),
        "reward_accuracy": None,
        "calibration_error": None,
        **({} if fit.margins is None else reward_numbers(fit.margins, seed=recipe.seed)),
    }
    return Measurement(summary=summary, samples=samples, actor=actor, reference=reference)


def load_trained(run: Run, model: HydraModel, which: str) -> tuple[int, str, StageLimits, SourceMoments]:
    """Put the `last` or `best` valid checkpoint of stage 2, or that of a step, into the model.

    Returns its step, what it is in words, the limits that training ended with, and the unit of its held-out scores.

    Without scores of held-out prompts there is no best one, and the last is taken. Raises `CheckpointError`.
    """
    store = run.checkpoints(STAGE2[run.recipe.method])
    checkpoint = store.latest_valid()
    if checkpoint is None:
        raise CheckpointError(f"{store.folder} holds no checkpoint; the run cannot be measured without its last one")
    limits = StageLimits(**checkpoint.state["limits"])
    moments = moments_of(checkpoint.state.get("held_out_moments", {}))
    best = checkpoint.state.get("best_step")
    if which.isdecimal():
        checkpoint, name = store.load(int(which)), "chosen"
    elif which == "best" and best is not None:
        checkpoint, name = store.load(best), "best"
    else:
        name = "last"
    model.load_trained_state(checkpoint.tensors["model"])
    return checkpoint.step, f"{name} (step {checkpoint.step})", limits, moments


def gold_accuracy(raw: RawData) -> float | None:
    """Share of the noisy held-out pairs that the world's gold score ranks right: the ceiling of any reward model."""
    if raw.gold is None:
        return None
    prompts = ["".join(prompt_texts(pair.prompt)) for pair in raw.test.rows]
    chosen = [raw.gold(prompt, pair.chosen) for prompt, pair in zip(prompts, raw.test.rows, strict=True)]
    rejected = [raw.gold(prompt, pair.rejected) for prompt, pair in zip(prompts, raw.test.rows, strict=True)]
    return win_rate(chosen, rejected)


def base_sizes(model: HydraModel, *, optimizer: str = "adamw") -> BaseSizes:
    """Sizes of the actor's base and of one LoRA set on it (read off the method's own trunk)."""
    trunk = model.trunk(model.table["actor"].trunk)
    return sizes_of(trunk, model.lora, optimizer=optimizer, below_rank=trunk.below_rank)


def record_costs(run: Run, session: Session, seconds: float) -> None:
    """Add this process's seconds, peak memory and phases to those of the run's earlier processes (costs.json), and to
    summary.json and memory.json once they are there."""
    costs: dict[str, Any] = run.read_json("costs.json") if (run.folder / "costs.json").exists() else {}
    phases: dict[str, dict[str, int]] = costs.get("phases", {})
    for phase, numbers in session.memory.as_dict().items():
        known = phases.get(phase, {})
        phases[phase] = {key: max(value, known.get(key, 0)) for key, value in numbers.items()}
    wall = {
        "wall_s": costs.get("wall_s", 0.0) + seconds,
        "peak_rss_bytes": max(costs.get("peak_rss_bytes", 0), peak_rss_bytes()),
    }
    run.write_json("costs.json", wall | {"phases": phases})
    if run.stage_done("evaluation"):
        run.write_json("summary.json", run.read_json("summary.json") | wall)
        run.write_json("memory.json", run.read_json("memory.json") | {"measured": phases})
