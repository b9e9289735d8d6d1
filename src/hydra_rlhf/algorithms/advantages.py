"""Targets of actor and critic: generalised advantage estimation."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hydra_rlhf.algorithms.masking import is_prefix, masked_variance, zero_outside


@torch.no_grad()
def gae(
    rewards: Float[Tensor, "b r"],
    values: Float[Tensor, "b r"],
    mask: Bool[Tensor, "b r"],
    *,
    discount: float,
    gae_lambda: float,
) -> tuple[Float[Tensor, "b r"], Float[Tensor, "b r"]]:
    """`(advantages, returns)` of each response token, 0 outside `mask` (Schulman et al. 2016, equation 16).

    `values[t]` is the value of the state before token t; the value after the last counted token is 0, whether the
    response ended or was cut. `returns` are advantages + values, the critic's target. `mask` is a prefix of each row.
    Computed in at least fp32 and never differentiated.
    """
    assert is_prefix(mask), "advantages run over a prefix of each row"
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    rewards = zero_outside(rewards.to(dtype), mask)
    values = zero_outside(values.to(dtype), mask)
    advantages = torch.zeros_like(values)
    # Outside the mask reward, value and so the advantage are 0: each row starts by itself at its last counted token.
    next_value = values.new_zeros(values.shape[0])
    next_advantage = values.new_zeros(values.shape[0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + discount * next_value - values[:, t]
        next_advantage = delta + discount * gae_lambda * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def explained_variance(
    values: Float[Tensor, "b r"], returns: Float[Tensor, "b r"], mask: Bool[Tensor, "b r"]
) -> Float[Tensor, ""]:
    """1 - Var(returns - values) / Var(returns) over the masked entries.

    1 for a perfect critic, 0 for a constant one, negative for one worse than a constant; NaN if all returns are equal.
    """
    variance = masked_variance(returns, mask)
    explained = 1 - masked_variance(returns - values, mask) / variance
    return torch.where(variance > 0, explained, math.nan)
