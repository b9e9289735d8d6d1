"""THE supervised loop: SFT, reward model, Hydra-SFT and preference training differ only in their `Task`.

Stage 1 trains the LoRA-off half of a method's table: the roles `reference` (LM head) and `reward` (reward head). What
preference training makes of the loop is in `preference.py`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hydra_rlhf.config import LoraConfig, SupervisedConfig, SupervisedLoopConfig
from hydra_rlhf.data.formats import TokenizedPair
from hydra_rlhf.errors import ConfigError, NonFiniteError
from hydra_rlhf.evaluation.preferences import evaluate_preferences, mean_chosen_score
from hydra_rlhf.model.export import STAGE1_ADAPTER
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.roles import TRAINABLE_ROLES
from hydra_rlhf.records import LossOutput, RoleOutput, TokenBatch
from hydra_rlhf.runtime.checkpoint import Checkpoint
from hydra_rlhf.runtime.metrics import Accumulator
from hydra_rlhf.runtime.optimizer import Optimizer, ParamGroup, learning_rate_factor
from hydra_rlhf.stages.examples import (
    BatchCounts,
    Example,
    batch_rows,
    count,
    lm_mask,
    num_tokens,
    token_micro_batches,
)
from hydra_rlhf.stages.limits import StageLimits, map_micro_batches
from hydra_rlhf.stages.session import Session, due
from hydra_rlhf.stages.timing import Stopwatch

MAX_SKIPPED_IN_A_ROW = 3
"""Optimizer steps in a row without finite loss and gradient after which a run stops."""

Loss = Callable[[dict[str, RoleOutput], TokenBatch, BatchCounts], LossOutput]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a stage makes of the loop."""

    stage: str
    parameters: Mapping[str, nn.Parameter]
    """The tensors that learn, by name."""
    learning_rate: float
    """At its peak."""
    look: Callable[[TokenBatch, Sequence[Example]], dict[str, RoleOutput]]
    """(micro-batch, the batch it is cut from) -> what every role whose word the loss needs says about it."""
    loss: Loss
    evaluate: Callable[[int, StageLimits], dict[str, float]] | None
    """(step, limits) -> metrics of held-out data; None where there is none."""


def train_supervised(
    session: Session,
    model: HydraModel,
    examples: Sequence[Example],
    config: SupervisedConfig,
    *,
    stage: str,
    loss: Loss,
    lora: LoraConfig,
    seed: int,
    held_out: Sequence[TokenizedPair] = (),
    limits: StageLimits | None = None,
) -> None:
    """Train the LoRA-off roles of `model.table` on `examples`, in place, and shift the reward head to mean zero.

    With `tuning: lora` one LoRA set is trained and then merged into the weights, or kept below all others where they
    are quantised. Resumes from the run's newest checkpoint. Raises `NonFiniteError` after three skipped steps in a row.
    """
    roles = [role for role in ("reference", "reward") if role in model.table]
    refuse_full_tuning(model, roles, config, stage)
    adapter = add_stage1_adapter(model, roles, lora, seed) if config.tuning == "lora" else None

    def look(micro_batch: TokenBatch, batch: Sequence[Example]) -> dict[str, RoleOutput]:
        return model.evaluate(micro_batch, roles, lm_mask=lm_mask(micro_batch, batch), adapter_when_off=adapter)

    def evaluate(_: int, limits: StageLimits) -> dict[str, float]:
        rows = held_out[: config.max_eval_rows]
        return evaluate_preferences(model, rows, roles, limits=limits, adapter=adapter)

    task = Task(
        stage=stage,
        parameters=trained_parameters(model, roles, adapter),
        learning_rate=config.learning_rate or {"full": 1e-5, "lora": 2e-4}[config.tuning],
        look=look,
        loss=loss,
        evaluate=evaluate if held_out else None,
    )
    limits = run_loop(session, model, examples, config, task, seed=seed, limits=limits or StageLimits.of(config))
    for name in dict.fromkeys(model.table[role].trunk for role in roles):
        trunk = model.trunk(name)
        if adapter is not None:
            trunk.adopt_adapter(adapter)
        if trunk.quantized is None:
            trunk.model.config.name_or_path = ""  # no longer the model that was loaded
    if "reward" in roles:
        pairs = [example for example in examples if isinstance(example, TokenizedPair)]
        head = model.scalar_head(model.table["reward"].trunk, "reward")
        head.shift(mean_chosen_score(model, pairs, limits=limits))
    model.freeze_except(role for role in TRAINABLE_ROLES if role in model.table)


def run_loop(
    session: Session,
    model: HydraModel,
    examples: Sequence[Example],
    config: SupervisedLoopConfig,
    task: Task,
    *,
    seed: int,
    limits: StageLimits,
) -> StageLimits:
    """The loop: every step learns from one batch. Resumes from the run's newest checkpoint; returns the limits it ended
    with. Raises `NonFiniteError` after three skipped steps in a row, and where no step could be taken."""
    stage, parameters = task.stage, task.parameters
    num_steps = max(1, round(config.num_epochs * len(examples) / config.batch_size))
    optimizer = build_optimizer(parameters, task.learning_rate, config, num_steps)
    first_step, limits = restore(session.begin(stage), parameters, optimizer, limits)
    saved_step = first_step
    with session.progress(stage, num_steps, done=first_step) as progress:
        for step in range(first_step + 1, num_steps + 1):
            if session.stop.requested and step - 1 > saved_step:
                commit(session, stage, step - 1, parameters, optimizer, limits)
            session.stop.check()
            watch = Stopwatch(session.memory)

            # Learn: one optimizer step; sums over all micro-batches are divided by the counts of the whole batch.
            with watch.phase(stage):
                batch = [examples[row] for row in batch_rows(len(examples), config.batch_size, step - 1, seed, stage)]
                losses = add_gradients(model, batch, task, optimizer, limits)
                metrics = step_optimizer(optimizer, losses, stage)

            # Record: log, look at held-out data, save.
            tokens = num_tokens(batch)
            metrics |= {"train/num_tokens": float(tokens), "train/tokens_per_s": tokens / watch.seconds}
            if task.evaluate is not None and config.eval_every and due(config.eval_every, step, num_steps):
                metrics |= task.evaluate(step, limits)
            session.log(stage, step, metrics | limits.metrics() | {"time/step_s": watch.seconds})
            progress.advance(tokens, {"loss": metrics["loss/total"]})
            if due(config.save_every, step, num_steps):
                commit(session, stage, step, parameters, optimizer, limits)
                saved_step = step
    if optimizer.num_steps == 0:
        raise NonFiniteError(
            f"{stage}: no step had a finite loss and gradient; look at the model's weights and the data"
        )
    return limits


def refuse_full_tuning(model: HydraModel, roles: Sequence[str], config: SupervisedConfig, stage: str) -> None:
    """Raise `ConfigError` where all weights are to be trained and some are packed."""
    packed = next((base for role in roles if (base := model.trunk(model.table[role].trunk).quantized)), None)
    if packed is not None and config.tuning == "full":
        raise ConfigError(
            f"{stage}.tuning=full cannot train packed weights (model.quantization={packed.quantization}); "
            f"use {stage}.tuning=lora"
        )


def add_stage1_adapter(model: HydraModel, roles: Sequence[str], lora: LoraConfig, seed: int) -> str:
    """Put the LoRA set that stage 1 trains on the trunk of the LoRA-off roles; returns its name.

    A quantised trunk that an earlier stage has left one on goes on training that.
    """
    for trunk in dict.fromkeys(model.table[role].trunk for role in roles):
        if STAGE1_ADAPTER not in model.trunk(trunk).switch.below:
            model.add_adapter(STAGE1_ADAPTER, trunk, lora, seed)
    return STAGE1_ADAPTER


def trained_parameters(model: HydraModel, roles: Sequence[str], adapter: str | None) -> dict[str, nn.Parameter]:
    """Let exactly the tensors that this stage trains have gradients, and return them by name."""
    model.requires_grad_(False)
    parameters: dict[str, nn.Parameter] = {}
    for role in roles:
        groups = model.trained_parameters(role)
        if adapter is not None:
            trunk = model.table[role].trunk
            named = model.trunk(trunk).adapter_parameters(adapter)
            groups["trunk"] = {f"{trunk}.{name}": parameter for name, parameter in named.items()}
        for group in groups.values():
            parameters |= group
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], learning_rate: float, config: SupervisedLoopConfig, num_steps: int
) -> Optimizer:
    """AdamW over all of them at one rate."""
    return Optimizer(
        [ParamGroup("all", dict(parameters), learning_rate)],
        betas=config.adam_betas,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        kind=config.optimizer,
        factor=learning_rate_factor(config.schedule, math.ceil(config.warmup_frac * num_steps), num_steps),
    )


def add_gradients(
    model: HydraModel, batch: Sequence[Example], task: Task, optimizer: Optimizer, limits: StageLimits
) -> dict[str, float]:
    """Leave one batch's gradients on what `optimizer` trains; returns the batch's losses."""
    counts = count(batch)

    def learn(_: list[int], micro_batch: TokenBatch) -> Mapping[str, Tensor]:
        output = task.loss(task.look(micro_batch, batch), micro_batch, counts)
        output.loss.backward()
        return output.metrics | {"loss/total": output.loss.detach()}

    cut = partial(token_micro_batches, batch, pad_id=model.pad_id, device=model.device)
    losses = Accumulator()
    model.train()
    for seen in map_micro_batches(limits, cut, learn, start_over=optimizer.zero_grad):
        losses.add(seen)
    model.eval()
    return losses.result()


@torch.no_grad()
def restore(
    checkpoint: Checkpoint | None, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, limits: StageLimits
) -> tuple[int, StageLimits]:
    """Load a checkpoint, if there is one; returns the number of steps done, and the limits: `limits`, or less."""
    if checkpoint is None:
        return 0, limits
    for name, parameter in parameters.items():
        parameter.copy_(checkpoint.tensors["model"][name])
    optimizer.load_state(checkpoint.tensors["optimizer"])
    return checkpoint.step, StageLimits(**checkpoint.state["limits"]).at_most(limits)


def commit(
    session: Session,
    stage: str,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    limits: StageLimits,
) -> None:
    """Save everything the next step depends on."""
    tensors = {"model": {name: p.detach() for name, p in parameters.items()}, "optimizer": optimizer.state()}
    session.save(stage, step, tensors, {"limits": asdict(limits)})


def step_optimizer(optimizer: Optimizer, losses: dict[str, float], stage: str) -> dict[str, float]:
    """One optimizer step, skipped where loss or gradient is not finite. Raises `NonFiniteError`."""
    result = optimizer.step() if math.isfinite(losses["loss/total"]) else optimizer.skip()
    if optimizer.num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise NonFiniteError(
            f"{stage}: {optimizer.num_skipped_in_a_row} steps in a row had a loss ({losses['loss/total']}) or gradient "
            f"({result.grad_norm}) that is not finite; start a new run with a lower {stage}.learning_rate"
        )
    return losses | {
        "optim/grad_norm": result.grad_norm,
        "optim/learning_rate": result.learning_rates["all"],
        "optim/skipped_steps": float(optimizer.num_skipped),
    }
