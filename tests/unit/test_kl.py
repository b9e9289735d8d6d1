"""KL estimators and the adaptive coefficient against numbers worked out by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from hydra_rlhf.algorithms import kl

LN2 = 0.6931471805599453


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def test_estimators():
    # Token 1: actor 1/2, reference 1/4, so d = ln 2: k1 = ln 2, k2 = ln(2)^2 / 2, k3 = 1/2 - 1 + ln 2.
    # Token 2 the other way round, d = -ln 2: k1 = -ln 2, k2 the same, k3 = 2 - 1 - ln 2.
    logprobs, ref_logprobs = f64([[-LN2, -2 * LN2]]), f64([[-2 * LN2, -LN2]])
    expected = {
        "k1": [[0.6931471805599453, -0.6931471805599453]],
        "k2": [[0.2402265069591007, 0.2402265069591007]],
        "k3": [[0.1931471805599453, 0.3068528194400547]],
    }
    for name, numbers in expected.items():
        assert_close(kl.kl_estimate(logprobs, ref_logprobs, name), f64(numbers), rtol=0, atol=1e-10)


# Three tokens with probabilities 1/2, 1/4, 1/4 under the actor and 1/4, 1/4, 1/2 under the reference.
# KL(actor || reference) = 1/2 ln 2 + 0 - 1/4 ln 2 = ln(2) / 4. KL(reference || actor) is the same by symmetry.
ACTOR = f64([[0.5, 0.25, 0.25]])
REFERENCE = f64([[0.25, 0.25, 0.5]])


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    # The expectation over the actor is an exact sum over the vocabulary.
    # k2: 1/2 * (1/2 + 1/4) * ln(2)^2 = 3/8 * 0.4804530139 = 0.1801698802, above ln(2) / 4 = 0.1732867951.
    expected = {"k1": 0.17328679513998632, "k2": 0.18016988021932553, "k3": 0.17328679513998632}
    for name, number in expected.items():
        expectation = (ACTOR * kl.kl_estimate(ACTOR.log(), REFERENCE.log(), name)).sum()
        assert_close(expectation, f64(number), rtol=0, atol=1e-10)


def test_k1_is_unbiased_on_samples():
    # 40,000 tokens drawn from the actor; k1 is +-ln 2 or 0, so its standard error is about 0.57 / 200 = 0.003.
    tokens = torch.multinomial(ACTOR[0], 40_000, replacement=True, generator=torch.Generator().manual_seed(0))
    estimate = kl.kl_estimate(ACTOR.log()[:, tokens], REFERENCE.log()[:, tokens], "k1").mean()
    assert abs(estimate.item() - 0.1733) < 0.01


def test_gradients_in_expectation():
    # Through the sampled log-prob l, weighted by the actor's probabilities: k1 gives 1, k2 d, k3 1 - 1 / ratio.
    # Projected on the softmax logits z (dl_i/dz_j = [i = j] - p_j): k1 nothing, k2 the gradient of KL(actor || ref),
    # p (d - KL) = 1/2 (ln 2 - ln(2)/4), 1/4 (0 - ln(2)/4), 1/4 (-ln 2 - ln(2)/4); k3 that of KL(ref || actor), p - ref.
    expected = {
        "k1": [[0.0, 0.0, 0.0]],
        "k2": [[0.375 * LN2, -0.0625 * LN2, -0.3125 * LN2]],
        "k3": [[0.25, 0.0, -0.25]],
    }
    for name, gradient in expected.items():
        logits = ACTOR.log().requires_grad_()
        estimate = kl.kl_estimate(logits.log_softmax(-1), REFERENCE.log(), name)
        (ACTOR * estimate).sum().backward()
        assert_close(logits.grad, f64(gradient), rtol=0, atol=1e-10)


def test_k3_of_a_tiny_difference_keeps_its_digits():
    # k3 = d^2 / 2 - d^3 / 6 + ...: 5e-13 for d = 1e-6, of which exp(-d) - 1 + d would keep three digits.
    estimate = kl.kl_estimate(f64([[1e-6]]), f64([[0.0]]), "k3")
    assert_close(estimate, f64([[5e-13]]), rtol=1e-6, atol=0)


CONTROLLER = {"target": 6.0, "horizon": 10_000, "num_sequences": 500}


def test_controller():
    # 500 / 10,000 = 0.05. At 6.6 nats the error is 0.1, so 0.02 * (1 + 0.1 * 0.05) = 0.0201; at 5.4, 0.0199.
    # At 12 the error is clipped to 0.2: 0.02 * 1.01 = 0.0202; at 0, to -0.2: 0.0198.
    expected = {6.6: 0.0201, 5.4: 0.0199, 6.0: 0.02, 12.0: 0.0202, 0.0: 0.0198, math.inf: 0.0202, -1.0: 0.0198}
    for measured_kl, number in expected.items():
        assert math.isclose(kl.next_kl_coef(0.02, measured_kl, **CONTROLLER), number, rel_tol=1e-12)


def test_controller_is_relative():
    # Scales with the coefficient: 0.5 * 1.005 = 0.5025. Target 2, measured 2.1: error 0.05, 1 * (1 + 0.05 * 0.05).
    assert math.isclose(kl.next_kl_coef(0.5, 6.6, **CONTROLLER), 0.5025, rel_tol=1e-12)
    assert math.isclose(kl.next_kl_coef(1.0, 2.1, **(CONTROLLER | {"target": 2.0})), 1.0025, rel_tol=1e-12)


def test_controller_ignores_nan():
    assert kl.next_kl_coef(0.02, math.nan, **CONTROLLER) == 0.02


def test_controller_cannot_turn_negative():
    # 1 - 0.2 * 5 = 0: with five times the horizon's sequences in one step the coefficient would die or change sign.
    with pytest.raises(AssertionError, match="raise the horizon"):
        kl.next_kl_coef(0.02, 1.0, target=6.0, horizon=100, num_sequences=500)
