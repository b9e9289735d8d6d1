"""Losses that let a policy learn from preference pairs without a reward model: a reward is read off its log-probs.

Rows are those of a batch of pairs: the chosen ones, then as many rejected ones. As in `losses.py` sums are divided by
the count of the *whole* batch, and what is differentiated is selected before anything nonlinear.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from hydra_rlhf.algorithms.masking import zero_outside
from hydra_rlhf.records import LossOutput


def dpo_loss(
    logprobs: Float[Tensor, "b r"],
    ref_logprobs: Float[Tensor, "b r"],
    mask: Bool[Tensor, "b r"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
    num_pairs: int,
) -> LossOutput:
    """Direct preference optimisation (Rafailov et al. 2023, equation 7), summed over pairs, divided by `num_pairs`.

    -log sigmoid(r(chosen) - r(rejected)) with the implicit reward r = beta * log(pi(y | x) / pi_ref(y | x)). With
    `label_smoothing` a pair counts with that weight the other way round (conservative DPO, Mitchell 2023).
    """
    rewards = beta * zero_outside(logprobs - ref_logprobs, mask).sum(dim=1)
    return _of_pairs(rewards, logprobs, mask, gamma=0.0, label_smoothing=label_smoothing, num_pairs=num_pairs)


def simpo_loss(
    logprobs: Float[Tensor, "b r"],
    mask: Bool[Tensor, "b r"],
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
    num_pairs: int,
) -> LossOutput:
    """Simple preference optimisation (Meng et al. 2024, equation 6), summed over pairs, divided by `num_pairs`.

    -log sigmoid(r(chosen) - r(rejected) - gamma) with the reward r = beta / |y| * log pi(y | x): without a reference,
    per token, and asked to be `gamma` apart. `label_smoothing` as in `dpo_loss`.
    """
    rewards = beta * zero_outside(logprobs, mask).sum(dim=1) / mask.sum(dim=1)
    return _of_pairs(rewards, logprobs, mask, gamma=gamma, label_smoothing=label_smoothing, num_pairs=num_pairs)


def _of_pairs(
    rewards: Float[Tensor, " b"],
    logprobs: Float[Tensor, "b r"],
    mask: Bool[Tensor, "b r"],
    *,
    gamma: float,
    label_smoothing: float,
    num_pairs: int,
) -> LossOutput:
    """The loss of these rewards, with its metrics: `train/pair_accuracy` (share of pairs whose chosen side has the
    higher reward, ties half), `train/margin` (mean of chosen - rejected), and `train/chosen_logprob` and
    `train/rejected_logprob` (mean log-prob of a response, in nats)."""
    chosen, rejected = rewards.chunk(2)
    margins = chosen - rejected
    right, wrong = F.logsigmoid(margins - gamma), F.logsigmoid(gamma - margins)
    loss = -((1 - label_smoothing) * right + label_smoothing * wrong).sum() / num_pairs
    with torch.no_grad():
        of_chosen, of_rejected = zero_outside(logprobs, mask).sum(dim=1).chunk(2)
        metrics = {
            "train/pair_accuracy": ((margins > 0).sum() + 0.5 * (margins == 0).sum()) / num_pairs,
            "train/margin": margins.sum() / num_pairs,
            "train/chosen_logprob": of_chosen.sum() / num_pairs,
            "train/rejected_logprob": of_rejected.sum() / num_pairs,
        }
    return LossOutput(loss=loss, metrics=metrics)
