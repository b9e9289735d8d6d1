"""Advantages without a critic: responses against others to the same prompt, against the greedy one, or against all.

`rewards` are per token; what stands outside `mask` does not matter, and a row whose mask is empty is left out of every
mean. `groups` names each row's prompt. Sums of a response are float64: what rounding leaves of equal ones must not be
blown up by a division. Nothing is differentiated.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hydra_rlhf.algorithms.advantages import gae
from hydra_rlhf.algorithms.masking import VARIANCE_FLOOR, standardize, zero_outside


@torch.no_grad()
def rloo(rewards: Float[Tensor, "b r"], mask: Bool[Tensor, "b r"], groups: Int[Tensor, " b"]) -> Float[Tensor, "b r"]:
    """Each response's summed rewards minus the mean of the others to its prompt (Ahmadian et al. 2024).

    The same for all its tokens; 0 where it has no other to be compared with.
    """
    centred, sizes = _centred(rewards, mask, groups)
    # Total - mean of the n - 1 others = (total - mean of all n) * n / (n - 1).
    return _at_every_token(centred * sizes / (sizes - 1).clamp(min=1), rewards, mask)


@torch.no_grad()
def grpo(rewards: Float[Tensor, "b r"], mask: Bool[Tensor, "b r"], groups: Int[Tensor, " b"]) -> Float[Tensor, "b r"]:
    """Each response's summed rewards in deviations from the mean of its prompt (Shao et al. 2024).

    The same for all its tokens. The standard deviation has divisor n; equal responses get 0.
    """
    centred, sizes = _centred(rewards, mask, groups)
    variance = _sum_in_groups(centred**2, groups) / sizes.clamp(min=1)
    return _at_every_token(centred * (variance + VARIANCE_FLOOR).rsqrt(), rewards, mask)


@torch.no_grad()
def dr_grpo(
    rewards: Float[Tensor, "b r"], mask: Bool[Tensor, "b r"], groups: Int[Tensor, " b"]
) -> Float[Tensor, "b r"]:
    """Each response's summed rewards minus the mean of its prompt, and no division (Liu et al. 2025)."""
    centred, _ = _centred(rewards, mask, groups)
    return _at_every_token(centred, rewards, mask)


@torch.no_grad()
def flat_group_frac(
    rewards: Float[Tensor, "b r"], mask: Bool[Tensor, "b r"], groups: Int[Tensor, " b"]
) -> Float[Tensor, ""]:
    """Share of the prompts with several responses that count whose summed rewards are all equal: they teach nothing.

    Equal means a deviation within what `grpo` adds to it; NaN where no prompt has several.
    """
    centred, sizes = _centred(rewards, mask, groups)
    is_flat = _sum_in_groups(centred**2, groups) <= sizes * VARIANCE_FLOOR
    of_group = torch.where(mask.any(dim=1) & (sizes > 1), 1 / sizes, 0.0)  # what part of its group a row is
    return zero_outside(of_group, is_flat).sum() / of_group.sum()


@torch.no_grad()
def remax(
    rewards: Float[Tensor, "b r"], mask: Bool[Tensor, "b r"], baselines: Float[Tensor, " b"]
) -> Float[Tensor, "b r"]:
    """Rewards still to come minus the score of the greedy response to the same prompt (Li et al. 2023)."""
    return zero_outside(returns_to_go(rewards, mask, discount=1.0) - baselines.unsqueeze(1), mask)


@torch.no_grad()
def reinforce_plus_plus(
    rewards: Float[Tensor, "b r"], mask: Bool[Tensor, "b r"], *, discount: float
) -> Float[Tensor, "b r"]:
    """Rewards still to come, standardised over all tokens that count (Hu 2025)."""
    return standardize(returns_to_go(rewards, mask, discount=discount), mask)


def returns_to_go(rewards: Float[Tensor, "b r"], mask: Bool[Tensor, "b r"], *, discount: float) -> Float[Tensor, "b r"]:
    """Discounted sum of the rewards from each token to the last one: GAE of a critic that always says 0, lambda 1."""
    return gae(rewards, torch.zeros_like(rewards), mask, discount=discount, gae_lambda=1.0)[0]


def _centred(
    rewards: Float[Tensor, "b r"], mask: Bool[Tensor, "b r"], groups: Int[Tensor, " b"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Summed rewards minus their mean over the group's rows that count, 0 in others; and how many rows that are."""
    counted = mask.any(dim=1)
    totals = zero_outside(rewards, mask).double().sum(dim=1)
    sizes = _sum_in_groups(counted.double(), groups)
    means = _sum_in_groups(totals, groups) / sizes.clamp(min=1)
    return zero_outside(totals - means, counted), sizes


def _sum_in_groups(x: Float[Tensor, " b"], groups: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """At each row the sum over all rows of its group."""
    number = groups.unique(return_inverse=True)[1]
    return torch.zeros_like(x).index_add(0, number, x)[number]


def _at_every_token(
    x: Float[Tensor, " b"], rewards: Float[Tensor, "b r"], mask: Bool[Tensor, "b r"]
) -> Float[Tensor, "b r"]:
    """A row's number at each of its tokens that count, 0 elsewhere, in at least float32 as rewards are."""
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    return zero_outside(x.to(dtype).unsqueeze(1).expand(mask.shape), mask)
