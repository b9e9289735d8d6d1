"""THE supervised loop: SFT, reward model and Hydra-SFT differ only in their examples and their loss.

Stage 1 trains the LoRA-off half of a method's table: the roles `reference` (LM head) and `reward` (reward head).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from hydra_rlhf.config import LoraConfig, SupervisedConfig
from hydra_rlhf.data.formats import TokenizedPair
from hydra_rlhf.errors import NonFiniteError
from hydra_rlhf.evaluation.preferences import evaluate_preferences, mean_chosen_score
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
    token_counts,
    token_micro_batches,
)
from hydra_rlhf.stages.session import Session, due
from hydra_rlhf.stages.timing import Stopwatch

STAGE1_ADAPTER = "stage1"
"""Name of the LoRA set that stage 1 trains and merges when `tuning` is `lora`."""
MAX_SKIPPED_IN_A_ROW = 3
"""Optimizer steps in a row without finite loss and gradient after which a run stops."""

Loss = Callable[[dict[str, RoleOutput], TokenBatch, BatchCounts], LossOutput]


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
) -> None:
    """Train the LoRA-off roles of `model.table` on `examples`, in place, and shift the reward head to mean zero.

    With `tuning: lora` one LoRA set is trained and then merged into the weights. Resumes from the run's newest
    checkpoint. Raises `NonFiniteError` after three skipped steps in a row.
    """
    roles = [role for role in ("reference", "reward") if role in model.table]
    adapter = add_stage1_adapter(model, roles, lora, seed) if config.tuning == "lora" else None
    parameters = trained_parameters(model, roles, adapter)
    num_steps = max(1, round(config.num_epochs * len(examples) / config.batch_size))
    optimizer = build_optimizer(parameters, config, num_steps)
    first_step = restore(session.begin(stage), parameters, optimizer)
    saved_step = first_step
    with session.progress(stage, num_steps, done=first_step) as progress:
        for step in range(first_step + 1, num_steps + 1):
            if session.stop.requested and step - 1 > saved_step:
                commit(session, stage, step - 1, parameters, optimizer)
            session.stop.check()
            watch = Stopwatch(session.memory)

            # Learn: one optimizer step; sums over all micro-batches are divided by the counts of the whole batch.
            with watch.phase(stage):
                batch = [examples[row] for row in batch_rows(len(examples), config.batch_size, step - 1, seed, stage)]
                counts = count(batch)
                losses = Accumulator()
                model.train()
                for micro_batch in token_micro_batches(batch, config.micro_batch_tokens, model.pad_id, model.device):
                    outputs = model.evaluate(
                        micro_batch, roles, lm_mask=lm_mask(micro_batch, batch), adapter_when_off=adapter
                    )
                    output = loss(outputs, micro_batch, counts)
                    output.loss.backward()
                    losses.add(output.metrics | {"loss/total": output.loss.detach()})
                model.eval()
                metrics = step_optimizer(optimizer, losses.result(), stage)

            # Record: log, look at held-out pairs, save.
            num_tokens = sum(token_counts(batch))
            metrics |= {"train/num_tokens": float(num_tokens), "train/tokens_per_s": num_tokens / watch.seconds}
            if held_out and config.eval_every and due(config.eval_every, step, num_steps):
                metrics |= evaluate_preferences(
                    model,
                    held_out[: config.max_eval_rows],
                    roles,
                    micro_batch_tokens=config.micro_batch_tokens,
                    adapter=adapter,
                )
            session.log(stage, step, metrics | {"time/step_s": watch.seconds})
            progress.advance(num_tokens, {"loss": metrics["loss/total"]})
            if due(config.save_every, step, num_steps):
                commit(session, stage, step, parameters, optimizer)
                saved_step = step
    if optimizer.num_steps == 0:
        raise NonFiniteError(
            f"{stage}: no step had a finite loss and gradient; look at the model's weights and the data"
        )
    for name in dict.fromkeys(model.table[role].trunk for role in roles):
        if adapter is not None:
            model.trunk(name).merge_adapter(adapter)
        model.trunk(name).model.config.name_or_path = ""  # no longer the model that was loaded
    if "reward" in roles:
        pairs = [example for example in examples if isinstance(example, TokenizedPair)]
        head = model.scalar_head(model.table["reward"].trunk, "reward")
        head.shift(mean_chosen_score(model, pairs, micro_batch_tokens=config.micro_batch_tokens))
    model.freeze_except(role for role in TRAINABLE_ROLES if role in model.table)


def add_stage1_adapter(model: HydraModel, roles: Sequence[str], lora: LoraConfig, seed: int) -> str:
    """Put the LoRA set that stage 1 trains on the trunk of the LoRA-off roles; returns its name."""
    for trunk in dict.fromkeys(model.table[role].trunk for role in roles):
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


def build_optimizer(parameters: dict[str, nn.Parameter], config: SupervisedConfig, num_steps: int) -> Optimizer:
    """AdamW over all of them at one rate: `learning_rate`, or 1e-5 for full tuning and 2e-4 for LoRA."""
    rate = config.learning_rate or {"full": 1e-5, "lora": 2e-4}[config.tuning]
    return Optimizer(
        [ParamGroup("all", parameters, rate)],
        betas=config.adam_betas,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        factor=learning_rate_factor(config.schedule, math.ceil(config.warmup_frac * num_steps), num_steps),
    )


@torch.no_grad()
def restore(checkpoint: Checkpoint | None, parameters: dict[str, nn.Parameter], optimizer: Optimizer) -> int:
    """Load a checkpoint, if there is one; returns the number of steps done."""
    if checkpoint is None:
        return 0
    for name, parameter in parameters.items():
        parameter.copy_(checkpoint.tensors["model"][name])
    optimizer.load_state(checkpoint.tensors["optimizer"])
    return checkpoint.step


def commit(session: Session, stage: str, step: int, parameters: dict[str, nn.Parameter], optimizer: Optimizer) -> None:
    """Save everything the next step depends on."""
    tensors = {"model": {name: p.detach() for name, p in parameters.items()}, "optimizer": optimizer.state()}
    session.save(stage, step, tensors, {})


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
