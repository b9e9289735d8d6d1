"""Preference training: the actor's LoRA set learns from pairs as they are, by the supervised loop (DPO, SimPO).

The reference is the same weights with LoRA off. It reads each micro-batch just before the actor does, without a
gradient, so there is neither a second model nor a pass over the data beforehand.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from hydra_rlhf.algorithms.preference_losses import dpo_loss, simpo_loss
from hydra_rlhf.config import PPOConfig, PreferenceConfig
from hydra_rlhf.data.formats import ChatFormat, TokenizedPair
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.roles import PAIR_READERS, TRAINABLE_ROLES
from hydra_rlhf.records import LossOutput, RoleOutput, TokenBatch
from hydra_rlhf.runtime.metrics import Accumulator
from hydra_rlhf.stages.examples import BatchCounts, Example, count, token_micro_batches
from hydra_rlhf.stages.held_out import HeldOut
from hydra_rlhf.stages.limits import StageLimits, map_micro_batches
from hydra_rlhf.stages.session import Session
from hydra_rlhf.stages.supervised import Loss, Task, run_loop, trained_parameters

STAGE = "preference"
HELD_OUT_METRICS = {
    "loss/preference": "eval/preference_loss",
    "train/pair_accuracy": "eval/pair_accuracy",
    "train/margin": "eval/margin",
}
"""What is kept of the loss and of its metrics on held-out pairs: {metric of a training batch: ours}."""


def train_preference_stage(
    session: Session,
    model: HydraModel,
    chat: ChatFormat,
    pairs: Sequence[TokenizedPair],
    config: PreferenceConfig,
    *,
    method: str,
    ppo: PPOConfig,
    seed: int,
    held_out_pairs: Sequence[TokenizedPair] = (),
    held_out: HeldOut | None = None,
    limits: StageLimits | None = None,
) -> None:
    """Stage 2 of a method that learns from pairs, on a model that stage 1 left; only the actor's LoRA set changes.

    `ppo` says how responses to held-out prompts are drawn and scored. Raises as `run_loop`.
    """
    loss = preference_loss(method, config)
    readers = PAIR_READERS[method]

    def evaluate(step: int, limits: StageLimits) -> dict[str, float]:
        rows = held_out_pairs[: config.max_eval_rows]
        metrics = read_held_out(model, rows, readers, loss, limits=limits) if rows else {}
        if held_out is not None:
            seen, samples = held_out.look(
                model, chat, replace(ppo, num_eval_prompts=config.num_eval_prompts), seed=seed, limits=limits
            )
            metrics |= seen
            for sample in samples:
                session.log_sample({"stage": STAGE, "step": step, "kind": "held_out", **sample})
        return metrics

    task = Task(
        stage=STAGE,
        parameters=trained_parameters(model, ["actor"], None),
        learning_rate=config.learning_rate,
        look=partial(look, model, readers),
        loss=loss,
        evaluate=evaluate,
    )
    run_loop(session, model, pairs, config, task, seed=seed, limits=limits or StageLimits.of(config))
    model.freeze_except(role for role in TRAINABLE_ROLES if role in model.table)


def look(
    model: HydraModel, readers: Sequence[str], micro_batch: TokenBatch, _: Sequence[Example]
) -> dict[str, RoleOutput]:
    """What the roles that only read say of both sides of each pair, and then the actor, with a graph."""
    with torch.no_grad():
        outputs = model.evaluate(micro_batch, readers)
    return outputs | model.evaluate(micro_batch, ["actor"])


@torch.no_grad()
def read_held_out(
    model: HydraModel, pairs: Sequence[TokenizedPair], readers: Sequence[str], loss: Loss, *, limits: StageLimits
) -> dict[str, float]:
    """`eval/preference_loss`, `eval/pair_accuracy` and `eval/margin`: the training loss on pairs it does not learn."""
    counts = count(pairs)

    def read(_: list[int], micro_batch: TokenBatch) -> dict[str, torch.Tensor]:
        return loss(look(model, readers, micro_batch, pairs), micro_batch, counts).metrics

    cut = partial(token_micro_batches, pairs, pad_id=model.pad_id, device=model.device)
    total = Accumulator()
    for seen in map_micro_batches(limits, cut, read):
        total.add(seen)
    found = total.result()
    return {ours: found[name] for name, ours in HELD_OUT_METRICS.items()}


def preference_loss(method: str, config: PreferenceConfig) -> Loss:
    """The loss of a method, with its settings filled in."""
    losses: dict[str, Loss] = {
        "dpo": partial(dpo, beta=config.dpo_beta, label_smoothing=config.label_smoothing),
        "simpo": partial(
            simpo, beta=config.simpo_beta, gamma=config.simpo_gamma, label_smoothing=config.label_smoothing
        ),
    }
    return losses[method]


def dpo(outputs: dict[str, RoleOutput], batch: TokenBatch, counts: BatchCounts, **settings: Any) -> LossOutput:
    """`dpo_loss` over the whole batch's pairs."""
    logprobs, ref_logprobs = outputs["actor"].logprobs, outputs["reference"].logprobs
    assert logprobs is not None
    assert ref_logprobs is not None
    return named(dpo_loss(logprobs, ref_logprobs, batch.response_mask, num_pairs=counts.num_examples, **settings))


def simpo(outputs: dict[str, RoleOutput], batch: TokenBatch, counts: BatchCounts, **settings: Any) -> LossOutput:
    """`simpo_loss` over the whole batch's pairs."""
    logprobs = outputs["actor"].logprobs
    assert logprobs is not None
    return named(simpo_loss(logprobs, batch.response_mask, num_pairs=counts.num_examples, **settings))


def named(output: LossOutput) -> LossOutput:
    """The loss with itself among its metrics."""
    return LossOutput(loss=output.loss, metrics=output.metrics | {"loss/preference": output.loss.detach()})
