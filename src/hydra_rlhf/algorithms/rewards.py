"""From one score per response to one reward per token, and the running scale of scores.

`scores` are per sequence, `rewards` per token. The rewards of a response add up to its score minus its KL penalty.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hydra_rlhf.algorithms.masking import last_true_index, zero_outside


def place_at_last_token(scores: Float[Tensor, " b"], mask: Bool[Tensor, "b r"]) -> Float[Tensor, "b r"]:
    """Each row's score at its last counted token, 0 elsewhere; `mask` is a prefix of at least one token per row."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    is_last = columns == last_true_index(mask).unsqueeze(1)
    return torch.where(is_last, scores.unsqueeze(1), 0.0)


def token_rewards(
    scores: Float[Tensor, " b"],
    dense_rewards: Float[Tensor, "b r"],
    kl: Float[Tensor, "b r"],
    mask: Bool[Tensor, "b r"],
    *,
    kl_coef: float,
) -> Float[Tensor, "b r"]:
    """Reward of each response token; 0 outside `mask`.

    `scores` hold the whole score of a response, the sum of its `dense_rewards` included (as in `Rollout`) and in the
    same unit. Each dense reward stays at its token, and what is left of the score goes to the last counted token:
    `reward[t] = dense[t] - kl_coef * kl[t] + (score - sum(dense) if t is last)`. So a row always adds up to
    `score - kl_coef * sum(kl)`, also where shaping has clipped the score. `kl` is in nats (`kl_estimate`).
    """
    dense = zero_outside(dense_rewards, mask)
    remainder = place_at_last_token(scores - dense.sum(dim=1), mask)
    return zero_outside(remainder + dense - kl_coef * kl, mask)


def shape_scores(
    scores: Float[Tensor, " b"],
    ended: Bool[Tensor, " b"],
    *,
    clip: float | None,
    missing_eos_penalty: float,
    scale: float,
) -> Float[Tensor, " b"]:
    """Scores as PPO sees them: divided by `scale`, then held in [-clip, clip], then penalised.

    `scale` is 1 or `Moments.scale`; `clip` None means not clipped. `missing_eos_penalty` is subtracted from responses
    that have not `ended`, after the clip, so that a bad score does not hide it.
    """
    assert scale > 0, "scores are divided by their scale"
    shaped = scores / scale
    if clip is not None:
        shaped = shaped.clamp(-clip, clip)
    return torch.where(ended, shaped, shaped - missing_eos_penalty)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Count, mean and spread of every score seen so far; plain floats, so that a JSON round trip is exact."""

    count: float = 0.0
    """Number of values seen."""
    mean: float = 0.0
    """Their mean; 0 before the first."""
    m2: float = 0.0
    """Sum of their squared deviations from the mean."""

    @property
    def variance(self) -> float:
        """Mean squared deviation (divisor n); 0 before the first value."""
        return self.m2 / self.count if self.count else 0.0

    @property
    def scale(self) -> float:
        """The standard deviation to divide scores by; 1 as long as the values seen are equal, or there are none."""
        deviation = math.sqrt(self.variance)
        # Equal values leave rounding errors in m2, relative to their size; dividing by those would blow scores up.
        return deviation if deviation > 1e-8 * abs(self.mean) else 1.0


def update_moments(moments: Moments, values: Float[Tensor, " n"]) -> Moments:
    """The moments after `values` too, in float64 (Chan, Golub and LeVeque 1979, the pairwise update).

    Values that are not finite are left out: the step they come from is skipped and counted elsewhere, and one of them
    would spoil the running scale for the rest of the run.
    """
    new = values.detach().double()
    new = new[new.isfinite()]
    if new.numel() == 0:
        return moments
    new_mean = new.mean()
    count = moments.count + new.numel()
    delta = new_mean.item() - moments.mean
    return Moments(
        count=count,
        mean=moments.mean + delta * new.numel() / count,
        m2=moments.m2 + ((new - new_mean) ** 2).sum().item() + delta**2 * moments.count * new.numel() / count,
    )
