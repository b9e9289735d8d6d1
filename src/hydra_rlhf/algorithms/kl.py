"""Estimates of KL(actor || reference) from sampled tokens, and the controller of its coefficient."""

import math
from typing import Literal, assert_never

import torch
from jaxtyping import Float
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]
"""Names of the estimators in Schulman, "Approximating KL Divergence" (2020)."""

MAX_CONTROLLER_ERROR = 0.2
"""The controller never reacts to more than 20 % off target in one step (Ziegler et al. 2019)."""


def kl_estimate(
    logprobs: Float[Tensor, "b r"], ref_logprobs: Float[Tensor, "b r"], estimator: KLEstimator
) -> Float[Tensor, "b r"]:
    """KL(actor || reference) in nats at each token, estimated from the token that the actor drew.

    With d = logprobs - ref_logprobs (Schulman 2020): k1 = d (unbiased, any sign), k2 = d^2 / 2 (biased, low variance),
    k3 = exp(-d) - 1 + d (unbiased, never negative). As a loss, k2 has the gradient of KL(actor || reference) in
    expectation, k1 has none, and k3 that of KL(reference || actor). Entries that do not count are the caller's to mask.
    """
    log_ratio = logprobs - ref_logprobs
    match estimator:
        case "k1":
            return log_ratio
        case "k2":
            return 0.5 * log_ratio**2
        case "k3":
            return torch.expm1(-log_ratio) + log_ratio
        case _:
            assert_never(estimator)


def next_kl_coef(kl_coef: float, measured_kl: float, *, target: float, horizon: int, num_sequences: int) -> float:
    """The adaptive coefficient after one PPO step (Ziegler et al. 2019, section 2.2, with K = num_sequences / horizon).

    `measured_kl` and `target` are in nats per response, `num_sequences` is what it was measured on, `horizon` (also in
    sequences) is over how many the coefficient reacts. The relative error is held within 0.2 either way. A measurement
    that is NaN leaves the coefficient as it is: such a step is skipped and counted elsewhere.
    """
    assert num_sequences * MAX_CONTROLLER_ERROR < horizon, "the coefficient could become negative: raise the horizon"
    if math.isnan(measured_kl):
        return kl_coef
    error = min(max(measured_kl / target - 1, -MAX_CONTROLLER_ERROR), MAX_CONTROLLER_ERROR)
    return kl_coef * (1 + error * num_sequences / horizon)
