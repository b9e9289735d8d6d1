"""Learning from a rollout that is seen once: each role that learns runs forward once, instead of first to score.

With one epoch and one minibatch the policy that scored is still the policy that learns, so the first forward of every
micro-batch can be the one that backward goes through. It gives what scoring and an update give one after the other: the
ratio is exactly one and the values are the critic's own. Roles with a pass each take no memory for it: a micro-batch is
done with before the next begins. Where actor and critic share one, the graphs of as many micro-batches as the memory
plan allows wait for the values of all rows, and only the others run forward again. Why this is possible:
docs/decisions/0015-one-forward-where-others-take-two.md.
"""

from collections.abc import Mapping, Sequence
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
from hydra_rlhf.records import PPOTargets, RoleOutput, Rollout, TokenBatch
from hydra_rlhf.runtime.metrics import Accumulator
from hydra_rlhf.runtime.optimizer import Optimizer
from hydra_rlhf.stages.estimators import estimate_advantages, row_weights
from hydra_rlhf.stages.limits import StageLimits, learn_after_looking, map_micro_batches
from hydra_rlhf.stages.micro_batches import micro_batches
from hydra_rlhf.stages.ppo_state import TrainPass
from hydra_rlhf.stages.ppo_update import apply, joined_loss, num_skipped


def roles_to_score(table: RoleTable, config: PPOConfig, *, step: int) -> tuple[str, ...]:
    """The roles that have to look at a rollout before anything is learned from it: all, or those that never learn.

    The ones that learn are left out where they can learn from the forward that scores: one epoch, one minibatch, and
    all of them learning.
    """
    if config.scoring == "separate" or not config.single_pass or step < config.critic_warmup_steps:
        return tuple(table)
    return tuple(role for role in table if role not in TRAINABLE_ROLES)


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
    if bool(rollout.valid.any()):
        model.train()
        learning = {role: model.table[role] for role in reversed(TRAINABLE_ROLES) if role in model.table}
        for train_pass, roles in passes(learning).items():
            names = tuple(roles)
            metrics |= learn_pass(model, optimizers[train_pass], names, seen, targets, config, rollout.logprobs, limits)
        model.eval()
    return seen, targets, metrics | {"optim/skipped_steps": num_skipped(optimizers), "ppo/update_frac": 1.0}


def learn_pass(
    model: HydraModel,
    optimizer: Optimizer,
    names: tuple[str, ...],
    seen: Rollout,
    targets: PPOTargets,
    config: PPOConfig,
    sampled_logprobs: Float[Tensor, "b r"],
    limits: StageLimits,
) -> dict[str, float]:
    """Gradients of every micro-batch, then one step of the optimizer of the roles that share a pass; metrics of both.

    The actor's loss needs the advantages of all rows. Alone it finds every value there; a critic in the same pass has
    to look at all rows before anything is learned.
    """
    look_at = partial(look, model, seen, targets, config, names)
    learn_from = partial(learn, seen, targets, config, sampled_logprobs)
    cut = partial(micro_batches, seen.batch)

    def estimate() -> None:
        targets.advantages.copy_(estimate_advantages(targets.rewards, seen, config)[0])

    if len(names) > 1:
        parts = learn_after_looking(limits, cut, look_at, estimate, learn_from, forget=optimizer.zero_grad)
    else:
        if "actor" in names:
            estimate()

        def look_and_learn(rows: Tensor, micro_batch: TokenBatch) -> Mapping[str, Tensor]:
            return learn_from(rows, micro_batch, look_at(rows, micro_batch))

        parts = map_micro_batches(limits, cut, look_and_learn, start_over=optimizer.zero_grad)
    losses = Accumulator()
    for part in parts:
        losses.add(part)
    found = losses.result()
    return found | apply(optimizer, found, None, tuple(name for name in TRAINABLE_ROLES if name in names))


def look(
    model: HydraModel,
    seen: Rollout,
    targets: PPOTargets,
    config: PPOConfig,
    names: Sequence[str],
    rows: Tensor,
    micro_batch: TokenBatch,
) -> dict[str, RoleOutput]:
    """What roles say about some rows, with their graph where gradients are enabled.

    Fills these rows of `seen`, and with a critic their returns: those of a row need its own values and no other's.
    """
    outputs = model.evaluate(
        micro_batch, names, temperature=config.sampling.temperature, entropy_gradient=config.entropy_coef > 0
    )
    mask, columns = micro_batch.response_mask & seen.valid[rows, None], slice(micro_batch.response_mask.shape[1])
    if "critic" in outputs:
        assert outputs["critic"].values is not None
        values = zero_outside(outputs["critic"].values.detach(), mask)
        rewards = targets.rewards[rows, columns]
        _, returns = gae(rewards, values, mask, discount=config.discount, gae_lambda=config.gae_lambda)
        seen.values[rows, columns] = values
        targets.returns[rows, columns] = returns
    if "actor" in outputs:
        logprobs, entropy = outputs["actor"].logprobs, outputs["actor"].entropy
        assert logprobs is not None
        assert entropy is not None
        seen.logprobs[rows, columns] = logprobs.detach()
        seen.entropy[rows, columns] = entropy.detach()
    return outputs


def learn(
    seen: Rollout,
    targets: PPOTargets,
    config: PPOConfig,
    sampled_logprobs: Float[Tensor, "b r"],
    rows: Tensor,
    micro_batch: TokenBatch,
    outputs: dict[str, RoleOutput],
) -> Mapping[str, Tensor]:
    """The gradient of roles on some rows, through the graph of what they said; the actor's at a ratio of one."""
    mask, columns = micro_batch.response_mask & seen.valid[rows, None], slice(micro_batch.response_mask.shape[1])
    num_tokens = int(seen.learn_mask.sum())
    weights = row_weights(seen, range(len(seen.responses)), config)
    loss = joined_loss(outputs, rows, mask, seen, targets, config, num_tokens, weights)
    loss.loss.backward()
    if "actor" not in outputs:
        return loss.metrics
    gap = masked_sum((seen.logprobs - sampled_logprobs)[rows, columns].abs(), mask) / num_tokens
    return {**loss.metrics, "rollout/logprob_gap": gap}


def learns_while_scoring(model: HydraModel, scored: Sequence[str]) -> bool:
    """Whether some role was left for the forward that learns."""
    return len(scored) < len(model.table)
