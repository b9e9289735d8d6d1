"""Sums, means and scales over the entries that count.

Masks are positive: True where an entry counts. Other entries are selected away with `torch.where`, never multiplied by
zero (NaN * 0 is NaN), so that whatever stands in padding changes neither a number nor a gradient.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

VARIANCE_FLOOR = 1e-8
"""Added to a variance before its root is taken, so that equal entries do not divide by zero."""


def zero_outside(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`x` where `mask`, exactly 0 elsewhere.

    Applied to what a loss differentiates *before* anything nonlinear, it also stops gradients: a NaN or an infinity
    that a later `exp` or square produces outside the mask is replaced by 0 on the way back. Selecting only at the end
    would not do: 0 * inf is NaN in backward.
    """
    return torch.where(mask, x, 0.0)


def masked_sum(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Sum of the masked entries; 0 if there are none."""
    return zero_outside(x, mask).sum()


def masked_mean(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean of the masked entries; NaN if there are none. For statistics: losses divide by an explicit count instead."""
    return masked_sum(x, mask) / mask.sum()


def masked_variance(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean squared deviation of the masked entries from their mean (divisor n, not n - 1); NaN if there are none."""
    centred = zero_outside(x - masked_mean(x, mask), mask)
    return masked_mean(centred**2, mask)


def standardize(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Zero mean and unit variance over the masked entries; 0 outside. Equal entries become 0."""
    centred = zero_outside(x - masked_mean(x, mask), mask)
    return centred * (masked_variance(x, mask) + VARIANCE_FLOOR).rsqrt()


def is_prefix(mask: Bool[Tensor, "b r"]) -> bool:
    """Whether each row counts its first entries and none after them."""
    return not bool((mask[:, 1:] & ~mask[:, :-1]).any())


def last_true_index(mask: Bool[Tensor, "b r"]) -> Int[Tensor, " b"]:
    """Column of the last counted entry of each row; every row is a prefix (see `is_prefix`) with at least one entry."""
    assert is_prefix(mask), "the mask counts an entry after one that does not count"
    assert bool(mask.any(dim=1).all()), "a row of the mask counts nothing"
    return mask.sum(dim=1) - 1
