"""How rewards become advantages: by a critic (GAE), or by one of the estimators that do without.

Each estimator is a function of rewards, rollout and settings; what it needs of the run (a critic's row, several
responses to a prompt, a greedy one) is settled before: `model/roles.py`, `config_checks.py`, `stages/greedy.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from hydra_rlhf.algorithms.advantages import gae
from hydra_rlhf.algorithms.group_advantages import (
    dr_grpo,
    flat_group_frac,
    grpo,
    reinforce_plus_plus,
    remax,
    rloo,
)
from hydra_rlhf.algorithms.masking import standardize
from hydra_rlhf.algorithms.token_weights import full_length_weights, response_mean_weights
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.config_checks import GROUP_ESTIMATORS
from hydra_rlhf.errors import ConfigError
from hydra_rlhf.model.roles import RoleTable
from hydra_rlhf.records import Rollout

Advantages: TypeAlias = tuple[Float[Tensor, "b r"], Float[Tensor, "b r"]]
"""(advantages as the policy loss takes them, returns for the critic), both 0 where nothing is learned."""


def estimate_advantages(rewards: Float[Tensor, "b r"], rollout: Rollout, config: PPOConfig) -> Advantages:
    """Advantages and returns of a whole rollout by `ppo.advantage_estimator`: minibatches are cut from them."""
    return ESTIMATORS[config.advantage_estimator](rewards, rollout, config)


def with_critic(rewards: Float[Tensor, "b r"], rollout: Rollout, config: PPOConfig) -> Advantages:
    """GAE, standardised once over the whole rollout."""
    mask = rollout.learn_mask
    advantages, returns = gae(rewards, rollout.values, mask, discount=config.discount, gae_lambda=config.gae_lambda)
    return standardize(advantages, mask), returns


def in_groups(
    function: Callable[[Float[Tensor, "b r"], Tensor, Int[Tensor, " b"]], Float[Tensor, "b r"]],
) -> Callable[[Float[Tensor, "b r"], Rollout, PPOConfig], Advantages]:
    """An estimator that compares the responses to one prompt, wherever in the rollout they are."""

    def estimate(rewards: Float[Tensor, "b r"], rollout: Rollout, config: PPOConfig) -> Advantages:
        del config
        return function(rewards, rollout.learn_mask, groups_of(rollout)), torch.zeros_like(rewards)

    return estimate


def groups_of(rollout: Rollout) -> Int[Tensor, " b"]:
    """The prompt of each row."""
    return rollout.prompts.prompt_index.to(rollout.scores.device)


def against_greedy(rewards: Float[Tensor, "b r"], rollout: Rollout, config: PPOConfig) -> Advantages:
    """ReMax."""
    del config
    return remax(rewards, rollout.learn_mask, rollout.baselines.to(rewards.dtype)), torch.zeros_like(rewards)


def against_all(rewards: Float[Tensor, "b r"], rollout: Rollout, config: PPOConfig) -> Advantages:
    """REINFORCE++."""
    advantages = reinforce_plus_plus(rewards, rollout.learn_mask, discount=config.discount)
    return advantages, torch.zeros_like(rewards)


ESTIMATORS: Mapping[str, Callable[[Float[Tensor, "b r"], Rollout, PPOConfig], Advantages]] = MappingProxyType(
    {
        "gae": with_critic,
        "rloo": in_groups(rloo),
        "grpo": in_groups(grpo),
        "dr-grpo": in_groups(dr_grpo),
        "remax": against_greedy,
        "reinforce++": against_all,
    }
)
"""Every value of `ppo.advantage_estimator`."""


def row_weights(rollout: Rollout, rows: Sequence[int], config: PPOConfig) -> Float64[Tensor, " b"] | None:
    """What a token of each row counts in the policy loss of the minibatch of `rows`; None = all alike.

    Every row of the rollout has its weight, so that a micro-batch takes those of its own.
    """
    lengths = rollout.batch.response_mask.sum(
        dim=1
    )  # of rows that are not valid too: they are selected away, not 0 / 0
    num_responses, num_tokens = int(rollout.valid[rows].sum()), int(rollout.learn_mask[rows].sum())
    match config.advantage_estimator:
        case "grpo":
            return response_mean_weights(lengths, num_responses=num_responses, num_tokens=num_tokens)
        case "dr-grpo":
            return full_length_weights(
                lengths,
                num_responses=num_responses,
                num_tokens=num_tokens,
                max_tokens=config.sampling.max_response_tokens,
            )
        case _:
            return None


def describe_groups(rewards: Float[Tensor, "b r"], rollout: Rollout, config: PPOConfig) -> dict[str, float]:
    """Metrics of the responses to one prompt beside each other, where the estimator compares them."""
    if config.advantage_estimator not in GROUP_ESTIMATORS:
        return {}
    return {"score/flat_group_frac": flat_group_frac(rewards, rollout.learn_mask, groups_of(rollout)).item()}


def check_roles(table: RoleTable, config: PPOConfig) -> None:
    """Raise `ConfigError` for a model with a critic that nothing asks, or without the one that GAE needs."""
    name = config.advantage_estimator
    if name == "gae" and "critic" not in table:
        raise ConfigError(
            "ppo.advantage_estimator=gae needs a critic, and this model was built without one; build it with "
            "with_critic=True, or choose rloo, grpo, dr-grpo, remax or reinforce++"
        )
    if name != "gae" and "critic" in table:
        raise ConfigError(
            f"ppo.advantage_estimator={name} has no use for a critic, and this model has one; build it with "
            "HydraModel.from_pretrained(..., with_critic=False)"
        )
