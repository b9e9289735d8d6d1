"""Losses as pure functions: a sum over the entries that count, divided by the count of the *whole* minibatch.

So micro-batches add up to the minibatch, whatever their size (`num_tokens` and `num_pairs` are never those of the
micro-batch). What is differentiated is selected with `zero_outside` before anything nonlinear; the sum selects again.
`row_weights` are what a token of each row counts instead of 1 (`token_weights.py`); metrics count every token alike.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from hydra_rlhf.algorithms.kl import KLEstimator, kl_estimate
from hydra_rlhf.algorithms.masking import masked_sum, zero_outside
from hydra_rlhf.records import LossOutput


def ppo_policy_loss(
    new_logprobs: Float[Tensor, "b r"],
    old_logprobs: Float[Tensor, "b r"],
    advantages: Float[Tensor, "b r"],
    mask: Bool[Tensor, "b r"],
    *,
    clip_range: float,
    num_tokens: int,
    row_weights: Float[Tensor, " b"] | None = None,
) -> LossOutput:
    """Clipped surrogate (Schulman et al. 2017, equation 7, as a loss): sum over `mask`, divided by `num_tokens`.

    The ratio is pi_new / pi_old. Metrics: `ppo/clip_frac` (share of tokens where the clip holds the loss back),
    `ppo/ratio_max`, `ppo/ratio_min`, and `kl/update`, the k3 estimate of KL(old || new) in nats per token.
    """
    log_ratio = zero_outside(new_logprobs - old_logprobs, mask)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = masked_sum(_weighted(torch.maximum(unclipped, clipped), row_weights), mask) / num_tokens
    with torch.no_grad():
        metrics = {
            "ppo/clip_frac": ((clipped > unclipped) & mask).sum() / num_tokens,
            "ppo/ratio_max": torch.where(mask, ratio, -math.inf).max(),
            "ppo/ratio_min": torch.where(mask, ratio, math.inf).min(),
            "kl/update": masked_sum(torch.expm1(log_ratio) - log_ratio, mask) / num_tokens,
        }
    return LossOutput(loss=loss, metrics=metrics)


def ppo_value_loss(
    new_values: Float[Tensor, "b r"],
    old_values: Float[Tensor, "b r"],
    returns: Float[Tensor, "b r"],
    mask: Bool[Tensor, "b r"],
    *,
    clip_range: float | None,
    num_tokens: int,
) -> LossOutput:
    """Half the squared error, the worse of the new value's and of the new value held within `clip_range` of the old.

    The clipped value loss of the PPO code base (Engstrom et al. 2020, section 3); `clip_range` None is the plain one.
    Metric: `ppo/value_clip_frac`, the share of tokens where the held value is the worse one (so no gradient flows).
    """
    values = zero_outside(new_values, mask)
    error = (values - returns) ** 2
    held = values
    if clip_range is not None:
        change = values - old_values
        # Only a value that moved too far is replaced: old + (new - old) is new but for rounding, which would count.
        held = torch.where(change.abs() > clip_range, old_values + change.clamp(-clip_range, clip_range), values)
    held_error = (held - returns) ** 2
    loss = 0.5 * masked_sum(torch.maximum(error, held_error), mask) / num_tokens
    value_clip_frac = ((held_error > error) & mask).sum() / num_tokens
    return LossOutput(loss=loss, metrics={"ppo/value_clip_frac": value_clip_frac})


def entropy_bonus(
    entropy: Float[Tensor, "b r"],
    mask: Bool[Tensor, "b r"],
    *,
    num_tokens: int,
    row_weights: Float[Tensor, " b"] | None = None,
) -> LossOutput:
    """Minus the mean entropy in nats per token: added to a loss with a positive weight, it rewards entropy."""
    return LossOutput(loss=-masked_sum(_weighted(entropy, row_weights), mask) / num_tokens, metrics={})


def kl_loss(
    new_logprobs: Float[Tensor, "b r"],
    ref_logprobs: Float[Tensor, "b r"],
    mask: Bool[Tensor, "b r"],
    *,
    estimator: KLEstimator,
    num_tokens: int,
    row_weights: Float[Tensor, " b"] | None = None,
) -> LossOutput:
    """Mean KL(actor || reference) in nats per token, by `kl_estimate` (which says what the gradient of each one is)."""
    estimate = kl_estimate(zero_outside(new_logprobs, mask), ref_logprobs, estimator)
    return LossOutput(loss=masked_sum(_weighted(estimate, row_weights), mask) / num_tokens, metrics={})


def sft_loss(logprobs: Float[Tensor, "b r"], mask: Bool[Tensor, "b r"], *, num_tokens: int) -> LossOutput:
    """Cross entropy of the response tokens in nats per token: minus the sum of their log-probs over `num_tokens`."""
    return LossOutput(loss=-masked_sum(logprobs, mask) / num_tokens, metrics={})


def ranking_loss(
    chosen_scores: Float[Tensor, " b"], rejected_scores: Float[Tensor, " b"], *, num_pairs: int
) -> LossOutput:
    """Bradley–Terry loss, -log sigmoid(chosen - rejected), summed over pairs and divided by `num_pairs`.

    Metrics: `train/pair_accuracy` (share of pairs where the chosen response scores higher, ties half) and
    `train/margin` (mean of chosen - rejected).
    """
    margins = chosen_scores - rejected_scores
    loss = -F.logsigmoid(margins).sum() / num_pairs
    with torch.no_grad():
        metrics = {
            "train/pair_accuracy": ((margins > 0).sum() + 0.5 * (margins == 0).sum()) / num_pairs,
            "train/margin": margins.sum() / num_pairs,
        }
    return LossOutput(loss=loss, metrics=metrics)


def _weighted(x: Float[Tensor, "b r"], row_weights: Float[Tensor, " b"] | None) -> Float[Tensor, "b r"]:
    """Each row's entries times its weight, in their own dtype."""
    return x if row_weights is None else x * row_weights.to(x.dtype).unsqueeze(1)
