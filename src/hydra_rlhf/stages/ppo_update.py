"""The learning half of a PPO step: minibatches, micro-batches, the losses of the roles that share a pass."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from hydra_rlhf.algorithms.losses import entropy_bonus, kl_loss, ppo_policy_loss, ppo_value_loss
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.config_checks import kl_estimator
from hydra_rlhf.errors import NonFiniteError
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.roles import TRAINABLE_ROLES, passes
from hydra_rlhf.records import LossOutput, PPOTargets, RoleOutput, Rollout, TokenBatch
from hydra_rlhf.runtime.metrics import Accumulator
from hydra_rlhf.runtime.optimizer import Optimizer
from hydra_rlhf.runtime.randomness import permutation
from hydra_rlhf.stages.estimators import row_weights
from hydra_rlhf.stages.limits import StageLimits, map_micro_batches
from hydra_rlhf.stages.micro_batches import micro_batches
from hydra_rlhf.stages.ppo_state import TrainPass

GRAD_NORM_OF = {"actor": "optim/actor_grad_norm", "critic": "optim/critic_grad_norm"}
LEARNING_RATE_OF = {"actor": "optim/actor_learning_rate", "critic": "optim/critic_learning_rate"}

MAX_SKIPPED_IN_A_ROW = 3
"""Optimizer steps in a row without finite loss and gradient after which a run stops."""


def update(
    model: HydraModel,
    optimizers: Mapping[TrainPass, Optimizer],
    rollout: Rollout,
    targets: PPOTargets,
    config: PPOConfig,
    *,
    step: int,
    seed: int,
    limits: StageLimits | None = None,
) -> dict[str, float]:
    """`num_epochs` passes of minibatch steps over one rollout, ended early where the actor has moved too far.

    Returns metrics averaged over the minibatch steps that were done.
    """
    warming_up = step < config.critic_warmup_steps and "critic" in model.table
    learning = [role for role in TRAINABLE_ROLES if role in model.table and not (warming_up and role == "actor")]
    limits = limits or StageLimits.of(config)
    seen: list[dict[str, float]] = []
    done = 0
    model.train()
    for rows in minibatches(len(rollout.responses), config, step=step, seed=seed):
        metrics, learned = learn_minibatch(model, optimizers, rollout, targets, config, rows, learning, limits)
        seen.append(metrics)
        if not learned:
            break
        done += 1
    model.eval()
    means = combine(seen)
    means["optim/skipped_steps"] = num_skipped(optimizers)
    planned = config.num_epochs * (len(rollout.responses) // config.minibatch_size)
    return means | {"ppo/update_frac": done / planned}


def num_skipped(optimizers: Mapping[TrainPass, Optimizer]) -> float:
    """Optimizer steps of this stage so far that changed nothing."""
    return float(sum(optimizer.num_skipped for optimizer in optimizers.values()))


def combine(seen: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One number per key over the minibatches that have it: the mean, or the extreme for `_max` and `_min`."""
    values: dict[str, list[float]] = {}
    for metrics in seen:
        for key, value in metrics.items():
            values.setdefault(key, []).append(value)
    extremes = {"_max": max, "_min": min}
    return {key: extremes.get(key[-4:], fmean)(numbers) for key, numbers in values.items()}


def minibatches(num_sequences: int, config: PPOConfig, *, step: int, seed: int) -> Iterator[list[int]]:
    """The rows of each minibatch of one PPO step: a new order every epoch."""
    for epoch in range(config.num_epochs):
        order = permutation(num_sequences, seed, "ppo", step, "minibatches", epoch)
        for start in range(0, num_sequences, config.minibatch_size):
            yield order[start : start + config.minibatch_size]


def learn_minibatch(
    model: HydraModel,
    optimizers: Mapping[TrainPass, Optimizer],
    rollout: Rollout,
    targets: PPOTargets,
    config: PPOConfig,
    rows: list[int],
    learning: Sequence[str],
    limits: StageLimits,
) -> tuple[dict[str, float], bool]:
    """One optimizer step of every pass that learns, role by role, so that one role's activations live at a time.

    Sums over micro-batches are divided by the whole minibatch's token count. Where memory runs out, only the pass it
    ran out in is done again. That is exact: a pass trains tensors that no other pass of the minibatch reads, and the
    others' optimizers may already have stepped. Returns (metrics, learned): where the actor has moved further than
    `max_update_kl` from the policy that sampled, nothing more is learned. A minibatch without a valid row is left out.
    """
    num_tokens = int(rollout.learn_mask[rows].sum())
    if num_tokens == 0:
        return {}, True
    cut = partial(micro_batches, rollout.batch, rows=rows)
    weights = row_weights(rollout, rows, config)

    def learn(roles: Sequence[str], index: Tensor, micro_batch: TokenBatch) -> Mapping[str, Tensor]:
        outputs = model.evaluate(
            micro_batch,
            roles,
            temperature=config.sampling.temperature,
            entropy_gradient=config.entropy_coef > 0,
        )
        mask = micro_batch.response_mask & rollout.valid[index, None]
        loss = joined_loss(outputs, index, mask, rollout, targets, config, num_tokens, weights)
        loss.loss.backward()
        return loss.metrics

    metrics: dict[str, float] = {}
    for train_pass, roles in passes({role: model.table[role] for role in learning}).items():
        optimizer = optimizers[train_pass]
        losses = Accumulator()
        for part in map_micro_batches(limits, cut, partial(learn, tuple(roles)), start_over=optimizer.zero_grad):
            losses.add(part)
        seen = losses.result()
        if config.max_update_kl is not None and seen.get("kl/update", 0.0) > config.max_update_kl:
            optimizer.zero_grad()
            return seen, False
        # Without the actor (critic warm-up) a LoRA set that both share stays as it is: the critic's own groups step.
        groups = None if "actor" in roles else [name for name in optimizer.group_names if name.startswith("critic/")]
        metrics |= seen | apply(optimizer, seen, groups, tuple(roles))
    return metrics, True


def joined_loss(
    outputs: dict[str, RoleOutput],
    index: Tensor,
    mask: Tensor,
    rollout: Rollout,
    targets: PPOTargets,
    config: PPOConfig,
    num_tokens: int,
    weights: Tensor | None,
) -> LossOutput:
    """The sum of the losses of the roles that share one trunk pass; alone, each role's own loss unweighted.

    `weights` are the rollout's `row_weights`, of the policy's losses alone.
    """
    width = mask.shape[1]
    own_weights = None if weights is None else weights[index]

    def cut(x: Tensor) -> Tensor:
        return x[index, :width]

    parts: list[tuple[float, LossOutput]] = []
    if "actor" in outputs:
        new_logprobs, entropy = outputs["actor"].logprobs, outputs["actor"].entropy
        assert new_logprobs is not None
        assert entropy is not None
        policy = ppo_policy_loss(
            new_logprobs,
            cut(rollout.logprobs),
            cut(targets.advantages),
            mask,
            clip_range=config.clip_range,
            num_tokens=num_tokens,
            row_weights=own_weights,
        )
        parts.append((1.0, logged("loss/policy", policy)))
        if targets.kl_coef:
            estimator = kl_estimator(config)
            assert estimator != "none"
            kl = kl_loss(
                new_logprobs,
                cut(rollout.ref_logprobs),
                mask,
                estimator=estimator,
                num_tokens=num_tokens,
                row_weights=own_weights,
            )
            parts.append((targets.kl_coef, logged("loss/kl", kl)))
        if config.entropy_coef:
            bonus = entropy_bonus(entropy, mask, num_tokens=num_tokens, row_weights=own_weights)
            parts.append((config.entropy_coef, logged("loss/entropy", bonus)))
    if "critic" in outputs:
        new_values = outputs["critic"].values
        assert new_values is not None
        value = ppo_value_loss(
            new_values,
            cut(rollout.values),
            cut(targets.returns),
            mask,
            clip_range=config.value_clip_range,
            num_tokens=num_tokens,
        )
        parts.append((config.value_coef if "actor" in outputs else 1.0, logged("loss/value", value)))
    total = torch.stack([weight * part.loss for weight, part in parts]).sum()
    return LossOutput(loss=total, metrics={key: value for _, part in parts for key, value in part.metrics.items()})


def logged(key: str, output: LossOutput) -> LossOutput:
    """The same loss with its own value among its metrics."""
    return LossOutput(loss=output.loss, metrics=output.metrics | {key: output.loss.detach()})


def apply(
    optimizer: Optimizer, losses: Mapping[str, float], groups: list[str] | None, roles: tuple[str, ...]
) -> dict[str, float]:
    """One optimizer step, skipped where a loss or the gradient is not finite.

    Raises `NonFiniteError` after `MAX_SKIPPED_IN_A_ROW` skipped steps; the parameters are those of the last good step.
    """
    if all(math.isfinite(value) for key, value in losses.items() if key.startswith("loss/")):
        result = optimizer.step(groups)
    else:
        result = optimizer.skip()
    if optimizer.num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise NonFiniteError(
            f"{optimizer.num_skipped_in_a_row} optimizer steps in a row of {' and '.join(roles)} had a loss or "
            f"gradient that is not finite ({dict(losses)}); start a new run with lower rates or ppo.reward.clip"
        )
    metrics: dict[str, float] = {}
    for role in roles:
        metrics[GRAD_NORM_OF[role]] = result.grad_norm
        rates = [rate for group, rate in result.learning_rates.items() if group.startswith(f"{role}/")]
        if rates:
            metrics[LEARNING_RATE_OF[role]] = rates[0]
    return metrics
