"""Losses on preference pairs against numbers worked out by hand, and the invariances: padding, micro-batches, order."""

import math

import pytest
import torch
from torch.testing import assert_close

from hydra_rlhf.algorithms import preference_losses

LN2, LN3, LN7 = math.log(2), math.log(3), math.log(7)
# Two chosen rows and two rejected ones; the second and the third have a single token.
MASK = torch.tensor([[True, True, True], [True, False, False], [True, False, False], [True, True, False]])


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, tolerance=1e-12):
    assert_close(actual.double(), f64(expected), rtol=0, atol=tolerance)


def dpo_pairs():
    """(log-probs, reference log-probs); chosen - rejected of the summed log-ratios: 2 ln 7 and -2 ln 3."""
    ref_logprobs = f64([[-1.0, -2.0, -3.0], [-4.0, 9.0, 9.0], [-5.0, 9.0, 9.0], [-2.0, -1.0, 9.0]])
    log_ratios = f64([[LN7, 1.0, -1.0], [0.5 - LN3, 7.0, 7.0], [-LN7, 7.0, 7.0], [0.25 + LN3, 0.25, 7.0]])
    return ref_logprobs + log_ratios, ref_logprobs


def test_dpo_loss():
    # beta 0.5 makes margins ln 7 and -ln 3 of them: -log(7 / 8) and -log(1 / 4). Two of the batch's five pairs.
    logprobs, ref_logprobs = dpo_pairs()
    logprobs.requires_grad_()
    output = preference_losses.dpo_loss(logprobs, ref_logprobs, MASK, beta=0.5, num_pairs=5)
    close(output.loss, (math.log(8 / 7) + math.log(4)) / 5)
    close(output.metrics["train/pair_accuracy"], 0.2, 1e-7)
    close(output.metrics["train/margin"], (LN7 - LN3) / 5)
    # Chosen: -6 + ln 7 and -3.5 - ln 3. Rejected: -5 - ln 7 and -2.5 + ln 3.
    close(output.metrics["train/chosen_logprob"], (-9.5 + LN7 - LN3) / 5)
    close(output.metrics["train/rejected_logprob"], (-7.5 - LN7 + LN3) / 5)
    assert not any(metric.requires_grad for metric in output.metrics.values())
    # Each token's gradient is -beta (1 - sigmoid(margin)) / 5 where chosen: 0.5 x 1/8 / 5 and 0.5 x 3/4 / 5.
    output.loss.backward()
    a, b = 0.0125, 0.075
    close(logprobs.grad, [[-a, -a, -a], [-b, 0.0, 0.0], [a, 0.0, 0.0], [b, b, 0.0]])


def test_dpo_loss_with_labels_that_are_not_trusted():
    # A quarter of each pair the other way round: -log(1 / 8) and -log(3 / 4).
    logprobs, ref_logprobs = dpo_pairs()
    output = preference_losses.dpo_loss(logprobs, ref_logprobs, MASK, beta=0.5, label_smoothing=0.25, num_pairs=2)
    right, wrong = math.log(8 / 7) + math.log(4), math.log(8) + math.log(4 / 3)
    close(output.loss, (0.75 * right + 0.25 * wrong) / 2)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_dpo_starts_at_log_2(label_smoothing: float):
    _, logprobs = dpo_pairs()
    output = preference_losses.dpo_loss(
        logprobs, logprobs, MASK, beta=3.0, label_smoothing=label_smoothing, num_pairs=2
    )
    close(output.loss, LN2)
    close(output.metrics["train/pair_accuracy"], 0.5, 1e-7)
    assert output.metrics["train/margin"] == 0


def simpo_pairs():
    """Log-probs; chosen - rejected of the means: (ln 3 + 0.5) / 2 and (0.5 - ln 3) / 2."""
    first, second = -2.0 - (LN3 + 0.5) / 2, -1.0 - (0.5 - LN3) / 2
    return f64([[-1.0, -2.0, -3.0], [-1.0, 9.0, 9.0], [first, 9.0, 9.0], [second - 0.5, second + 0.5, 9.0]])


def test_simpo_loss():
    # beta 2 makes margins ln 3 + 0.5 and 0.5 - ln 3 of them; gamma 0.5 leaves ln 3 and -ln 3: -log(3/4), -log(1/4).
    logprobs = simpo_pairs().requires_grad_()
    output = preference_losses.simpo_loss(logprobs, MASK, beta=2.0, gamma=0.5, num_pairs=4)
    close(output.loss, math.log(16 / 3) / 4)
    close(output.metrics["train/pair_accuracy"], 0.25, 1e-7)
    close(output.metrics["train/margin"], 0.25)
    close(output.metrics["train/chosen_logprob"], -7.0 / 4)
    # -2 - (ln 3 + 0.5) / 2 and 2 x (-1 - (0.5 - ln 3) / 2).
    close(output.metrics["train/rejected_logprob"], (-4.75 + LN3 / 2) / 4)
    assert not any(metric.requires_grad for metric in output.metrics.values())
    # -beta / |y| (1 - sigmoid) / 4 where chosen: 2/3 x 1/4 / 4 each, 2 x 3/4 / 4; rejected 2 x 1/4 / 4, 2/2 x 3/4 / 4.
    output.loss.backward()
    close(logprobs.grad, [[-1 / 24] * 3, [-0.375, 0.0, 0.0], [0.125, 0.0, 0.0], [0.1875, 0.1875, 0.0]])


def test_simpo_loss_with_labels_that_are_not_trusted():
    # gamma 0.5 leaves ln 3 and -ln 3, which the other way round are the same two: -log(3/4) - log(1/4).
    output = preference_losses.simpo_loss(simpo_pairs(), MASK, beta=2.0, gamma=0.5, label_smoothing=0.1, num_pairs=2)
    close(output.loss, math.log(16 / 3) / 2)
    # gamma 0: margins ln 3 + 0.5 and 0.5 - ln 3, whose sigmoids are 1 / (1 + e^-0.5 / 3) and 1 / (1 + 3 e^-0.5).
    output = preference_losses.simpo_loss(simpo_pairs(), MASK, beta=2.0, gamma=0.0, label_smoothing=0.1, num_pairs=2)
    e = math.exp(-0.5)
    right = math.log(1 + e / 3) + math.log(1 + 3 * e)
    wrong = math.log(1 + 3 / e) + math.log(1 + 1 / (3 * e))
    close(output.loss, (0.9 * right + 0.1 * wrong) / 2)


def test_accuracy_of_simpo_is_who_is_ahead_and_not_by_gamma():
    # Means -1 and -1.125: with beta 2 the margin is 0.25, below gamma.
    logprobs, mask = f64([[-1.0], [-1.125]]), torch.ones(2, 1, dtype=torch.bool)
    output = preference_losses.simpo_loss(logprobs, mask, beta=2.0, gamma=0.5, num_pairs=1)
    assert output.metrics["train/pair_accuracy"] == 1
    close(output.loss, math.log(1 + math.exp(0.25)))


def test_both_are_stable_far_from_zero():
    mask = torch.ones(2, 1, dtype=torch.bool)
    for scale in (1.0, -1.0):
        logprobs = f64([[-1000.0 * (scale < 0)], [-1000.0 * (scale > 0)]]).requires_grad_()
        expected = 0.0 if scale > 0 else 1000.0
        for output in (
            preference_losses.dpo_loss(logprobs, torch.zeros_like(logprobs), mask, beta=1.0, num_pairs=1),
            preference_losses.simpo_loss(logprobs, mask, beta=1.0, gamma=0.0, num_pairs=1),
        ):
            close(output.loss, expected)
            (gradient,) = torch.autograd.grad(output.loss, logprobs)
            assert gradient.isfinite().all()


def run(name, logprobs, ref_logprobs, mask, num_pairs):
    """(output, gradient) of a loss."""
    logprobs = logprobs.clone().requires_grad_()
    if name == "dpo":
        output = preference_losses.dpo_loss(
            logprobs, ref_logprobs, mask, beta=0.7, label_smoothing=0.1, num_pairs=num_pairs
        )
    else:
        output = preference_losses.simpo_loss(
            logprobs, mask, beta=1.3, gamma=0.4, label_smoothing=0.1, num_pairs=num_pairs
        )
    output.loss.backward()
    return output, logprobs.grad


def batch():
    """Three pairs of ragged responses: log-probs, reference log-probs, mask."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.tensor([3, 1, 5, 2, 4, 5])
    mask = torch.arange(5) < lengths[:, None]
    draw = [-4 * torch.rand(6, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    return (*draw, mask)


@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_padding_never_matters(name: str):
    logprobs, ref_logprobs, mask = batch()
    expected, expected_gradient = run(name, logprobs, ref_logprobs, mask, 3)
    for garbage in (math.nan, math.inf, -math.inf, 1e4):
        output, gradient = run(
            name, torch.where(mask, logprobs, garbage), torch.where(mask, ref_logprobs, garbage), mask, 3
        )
        close(output.loss, expected.loss.item(), 1e-10)
        assert_close(gradient, expected_gradient, rtol=0, atol=1e-10)
        for key, value in output.metrics.items():
            close(value, expected.metrics[key].item(), 1e-10)


@pytest.mark.parametrize("name", ["dpo", "simpo"])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_micro_batches_add_up_in_any_order(name: str, order: list[int]):
    logprobs, ref_logprobs, mask = batch()
    expected, expected_gradient = run(name, logprobs, ref_logprobs, mask, 3)
    for size in (1, 2):
        found, total, metrics = torch.zeros_like(logprobs), 0.0, dict.fromkeys(expected.metrics, 0.0)
        for start in range(0, 3, size):
            pairs = torch.tensor(order[start : start + size])
            rows = torch.cat([pairs, pairs + 3])
            output, gradient = run(name, logprobs[rows], ref_logprobs[rows], mask[rows], 3)
            found[rows] = gradient
            total += output.loss.item()
            metrics = {key: value + output.metrics[key].item() for key, value in metrics.items()}
        assert abs(total - expected.loss.item()) < 1e-10
        assert_close(found, expected_gradient, rtol=0, atol=1e-10)
        assert all(abs(value - expected.metrics[key].item()) < 1e-6 for key, value in metrics.items())
