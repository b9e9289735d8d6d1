"""Learning from a rollout that is seen once: each role that learns runs forward once, instead of first to score.

With one epoch and one minibatch the policy that scored is still the policy that learns, so the first forward of every
micro-batch can be the one that backward goes through. It gives what scoring and an update give one after the other: the
ratio is exactly one and the values are the critic's own. It costs no memory: a micro-batch is done with before the next
begins. Why this is possible: docs/decisions/0015-one-forward-where-others-take-two.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from hydra_rlhf.algorithms.advantages import gae
from hydra_rlhf.algorithms.masking import masked_sum, zero_outside
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.roles import TRAINABLE_ROLES, RoleTable, passes
from hydra_rlhf.records import PPOTargets, Rollout, TokenBatch
from hydra_rlhf.runtime.metrics import Accumulator
from hydra_rlhf.runtime.optimizer import Optimizer
from hydra_rlhf.stages.estimators import estimate_advantages, row_weights
from hydra_rlhf.stages.limits import StageLimits, map_micro_batches
from hydra_rlhf.stages.micro_batches import micro_batches
from hydra_rlhf.stages.ppo_state import TrainPass
from hydra_rlhf.stages.ppo_update import apply, joined_loss, num_skipped


def roles_to_score(table: RoleTable, config: PPOConfig, *, step: int) -> tuple[str, ...]:
    """The roles that have to look at a rollout before anything is learned from it: all, or those that never learn.

    The ones that learn are left out where each of them can learn from the forward that scores: one epoch, one
    minibatch, all of them learning, and each in a pass of its own (a joined pass needs its values before its loss).
    """
    once = config.num_epochs == 1 and config.minibatch_size == config.rollout_batch_size * config.samples_per_prompt
    learning = {role: table[role] for role in TRAINABLE_ROLES if role in table}
    apart = len(passes(learning)) == len(learning)
    if config.scoring == "separate" or not once or not apart or step < config.critic_warmup_steps:
        return tuple(table)
    return tuple(role for role in table if role not in learning)


def learn_in_one_pass(
    model: HydraModel,
    optimizers: Mapping[TrainPass, Optimizer],
    rollout: Rollout,
    rewards: Float[Tensor, "b r"],
    config: PPOConfig,
    *,
    kl_coef: float,
    limits: StageLimits,
) -> tuple[Rollout, PPOTargets, dict[str, float]]:
    """One optimizer step of critic and actor on a rollout that only the frozen roles have scored.

    `rewards` are complete: their KL reads the log-probs that sampling left in `rollout`. The critic goes first, since
    the actor needs its values of every row. Returns the rollout with what both said, the targets, and the metrics.
    """
    blank = torch.zeros_like(rewards)
    seen = replace(rollout, logprobs=blank, values=blank.clone(), entropy=blank.clone())  # filled by micro-batches
    targets = PPOTargets(rewards=rewards, advantages=blank.clone(), returns=blank.clone(), kl_coef=kl_coef)
    metrics: dict[str, float] = {}
    if not bool(rollout.valid.any()):
        return seen, targets, {"optim/skipped_steps": num_skipped(optimizers), "ppo/update_frac": 1.0}
    model.train()
    if "critic" in model.table:
        learn = partial(learn_values, model, seen, targets, config)
        metrics |= learn_role(model, optimizers, "critic", rollout, learn, limits)
    advantages, returns = estimate_advantages(rewards, seen, config)
    targets = replace(targets, advantages=advantages, returns=returns)
    learn = partial(learn_policy, model, seen, targets, config, rollout.logprobs)
    metrics |= learn_role(model, optimizers, "actor", rollout, learn, limits)
    model.eval()
    return seen, targets, metrics | {"optim/skipped_steps": num_skipped(optimizers), "ppo/update_frac": 1.0}


def learn_role(
    model: HydraModel,
    optimizers: Mapping[TrainPass, Optimizer],
    name: str,
    rollout: Rollout,
    learn: Callable[[Tensor, TokenBatch], Mapping[str, Tensor]],
    limits: StageLimits,
) -> dict[str, float]:
    """Gradients of every micro-batch, then one step of the role's optimizer; the metrics of both."""
    role = model.table[name]
    optimizer = optimizers[role.trunk, role.adapter]
    losses = Accumulator()
    cut = partial(micro_batches, rollout.batch)
    for part in map_micro_batches(limits, cut, learn, start_over=optimizer.zero_grad):
        losses.add(part)
    found = losses.result()
    return found | apply(optimizer, found, None, (name,))


def learn_values(
    model: HydraModel, seen: Rollout, targets: PPOTargets, config: PPOConfig, rows: Tensor, micro_batch: TokenBatch
) -> Mapping[str, Tensor]:
    """The critic's values of some rows, their targets, and the gradient of the value loss, all from one forward.

    The returns of a row need its own values and no other row's. Fills these rows of `seen.values` and of the returns.
    """
    outputs = model.evaluate(micro_batch, ("critic",), temperature=config.sampling.temperature)
    mask, columns = micro_batch.response_mask & seen.valid[rows, None], slice(micro_batch.response_mask.shape[1])
    assert outputs["critic"].values is not None
    values = zero_outside(outputs["critic"].values.detach(), mask)
    rewards = targets.rewards[rows, columns]
    _, returns = gae(rewards, values, mask, discount=config.discount, gae_lambda=config.gae_lambda)
    seen.values[rows, columns] = values
    targets.returns[rows, columns] = returns
    loss = joined_loss(outputs, rows, mask, seen, targets, config, num_tokens(seen), None)
    loss.loss.backward()
    return loss.metrics


def learn_policy(
    model: HydraModel,
    seen: Rollout,
    targets: PPOTargets,
    config: PPOConfig,
    sampled_logprobs: Float[Tensor, "b r"],
    rows: Tensor,
    micro_batch: TokenBatch,
) -> Mapping[str, Tensor]:
    """The actor's gradient on some rows, at a ratio of exactly one. Fills their log-probs and entropy in `seen`."""
    outputs = model.evaluate(
        micro_batch, ("actor",), temperature=config.sampling.temperature, entropy_gradient=config.entropy_coef > 0
    )
    mask, columns = micro_batch.response_mask & seen.valid[rows, None], slice(micro_batch.response_mask.shape[1])
    logprobs, entropy = outputs["actor"].logprobs, outputs["actor"].entropy
    assert logprobs is not None
    assert entropy is not None
    seen.logprobs[rows, columns] = logprobs.detach()
    seen.entropy[rows, columns] = entropy.detach()
    weights = row_weights(seen, range(len(seen.responses)), config)
    loss = joined_loss(outputs, rows, mask, seen, targets, config, num_tokens(seen), weights)
    loss.loss.backward()
    gap = masked_sum((logprobs.detach() - sampled_logprobs[rows, columns]).abs(), mask) / num_tokens(seen)
    return {**loss.metrics, "rollout/logprob_gap": gap}


def num_tokens(rollout: Rollout) -> int:
    """Response tokens that are learned from: what losses are divided by."""
    return int(rollout.learn_mask.sum())


def learns_while_scoring(model: HydraModel, scored: Sequence[str]) -> bool:
    """Whether some role was left for the forward that learns."""
    return len(scored) < len(model.table)
