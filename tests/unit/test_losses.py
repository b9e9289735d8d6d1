"""Losses against numbers worked out by hand, and the three invariances: padding, micro-batches, row order."""

import math

import pytest
import torch
from torch.testing import assert_close

from hydra_rlhf.algorithms import losses

LN2, LN3 = 0.6931471805599453, 1.0986122886681098


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, tolerance=1e-10):
    assert_close(actual.double(), f64(expected), rtol=0, atol=tolerance)


ALL = torch.ones(1, 6, dtype=torch.bool)


def test_policy_loss():
    # clip_range 0.2. Ratio, advantage, surrogate = min(ratio * A, clipped ratio * A):
    #   2, 3: min(6, 3.6) = 3.6, held      0.5, -1: min(-0.5, -0.8) = -0.8, held      0.5, 2: min(1, 1.6) = 1
    #   2, -1: min(-2, -1.2) = -2          1.1, 1: 1.1                                1.5, 2: min(3, 2.4) = 2.4, held
    # Their sum is 5.3, and this micro-batch is 6 of the minibatch's 10 tokens: loss -0.53.
    ratio, advantages = f64([[2.0, 0.5, 0.5, 2.0, 1.1, 1.5]]), f64([[3.0, -1.0, 2.0, -1.0, 1.0, 2.0]])
    old_logprobs = f64([[-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]])
    new_logprobs = (old_logprobs + ratio.log()).requires_grad_()
    output = losses.ppo_policy_loss(new_logprobs, old_logprobs, advantages, ALL, clip_range=0.2, num_tokens=10)
    close(output.loss, -0.53)
    close(output.metrics["ppo/clip_frac"], 0.3, 1e-7)
    close(output.metrics["ppo/ratio_max"], 2.0)
    close(output.metrics["ppo/ratio_min"], 0.5)
    # ratio - 1 - ln(ratio): twice 1 - ln 2, twice -0.5 + ln 2, 0.1 - ln 1.1 = 0.0046898, 0.5 - ln 1.5 = 0.0945349.
    close(output.metrics["kl/update"], 0.10992247120875108)
    # d(ratio)/d(logprob) = ratio: the gradient is -A * ratio / 10 where nothing is held, else 0.
    output.loss.backward()
    close(new_logprobs.grad, [[0.0, 0.0, -0.1, 0.2, -0.11, 0.0]])


def test_policy_loss_before_the_first_update():
    # Ratio 1 everywhere: the loss is minus the mean advantage, -(1 + 2 - 6 + 0 + 1 - 1) / 6 = 0.5; nothing has moved.
    logprobs = f64([[-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]])
    output = losses.ppo_policy_loss(
        logprobs, logprobs, f64([[1.0, 2.0, -6.0, 0.0, 1.0, -1.0]]), ALL, clip_range=0.2, num_tokens=6
    )
    close(output.loss, 0.5)
    close(output.metrics["ppo/clip_frac"], 0.0)
    close(output.metrics["kl/update"], 0.0)


def test_ratio_range_ignores_padding():
    # Ratios 0.5 and 0.25 count; the padding's own ratio, 4 here, does not, and neither does a neutral 0 or 1.
    old_logprobs, mask = f64([[-1.0, -1.0, -1.0]]), torch.tensor([[True, True, False]])
    new_logprobs = old_logprobs + f64([[0.5, 0.25, 4.0]]).log()
    output = losses.ppo_policy_loss(
        new_logprobs, old_logprobs, f64([[1.0, 1.0, 1.0]]), mask, clip_range=0.2, num_tokens=2
    )
    close(output.metrics["ppo/ratio_max"], 0.5)
    close(output.metrics["ppo/ratio_min"], 0.25)


def test_value_loss():
    # clip_range 0.2, half the worse squared error, old value 1 everywhere:
    #   new 2, return 0: 4 against (1.2)^2 = 1.44: 2        new 0.5, return 0: 0.25 against (0.8)^2 = 0.64: 0.32, held
    #   new 1.1, return 3: (1.9)^2 = 3.61 either way: 1.805       new 1.5, return 2: 0.25 against 0.64: 0.32, held
    # 4.445 in all, 4 of 5 tokens: 0.889. Gradient: (new - return) / 5, and 0 where held.
    new_values = f64([[2.0, 0.5, 1.1, 1.5]]).requires_grad_()
    old_values, returns, mask = f64([[1.0, 1.0, 1.0, 1.0]]), f64([[0.0, 0.0, 3.0, 2.0]]), ALL[:, :4]
    output = losses.ppo_value_loss(new_values, old_values, returns, mask, clip_range=0.2, num_tokens=5)
    close(output.loss, 0.889)
    close(output.metrics["ppo/value_clip_frac"], 0.4, 1e-7)
    output.loss.backward()
    close(new_values.grad, [[0.4, 0.0, -0.38, 0.0]])


def test_value_loss_without_clip():
    # The same numbers, plain: (4 + 0.25 + 3.61 + 0.25) / 2 / 5 = 0.811. Gradient: (new - return) / 5.
    new_values = f64([[2.0, 0.5, 1.1, 1.5]]).requires_grad_()
    old_values, returns, mask = f64([[1.0, 1.0, 1.0, 1.0]]), f64([[0.0, 0.0, 3.0, 2.0]]), ALL[:, :4]
    output = losses.ppo_value_loss(new_values, old_values, returns, mask, clip_range=None, num_tokens=5)
    close(output.loss, 0.811)
    close(output.metrics["ppo/value_clip_frac"], 0.0)
    output.loss.backward()
    close(new_values.grad, [[0.4, 0.1, -0.38, -0.1]])


def test_rounding_is_not_counted_as_value_clipping():
    # No value moves by more than 2, so none is held, although old + (new - old) is not always new in floating point.
    generator = torch.Generator().manual_seed(0)
    new_values, old_values, returns = 0.1 * torch.randn(3, 1, 1000, generator=generator)
    mask = torch.ones(1, 1000, dtype=torch.bool)
    output = losses.ppo_value_loss(new_values, old_values, returns, mask, clip_range=2.0, num_tokens=1000)
    close(output.metrics["ppo/value_clip_frac"], 0.0)


def test_entropy_bonus():
    # -(0.5 + 1.5) / 4 = -0.5: more entropy, less loss.
    entropy, mask = f64([[0.5, 1.5, 7.0]]), torch.tensor([[True, True, False]])
    close(losses.entropy_bonus(entropy, mask, num_tokens=4).loss, -0.5)


def test_kl_loss():
    # Log-ratios ln 2 and -ln 2 over 4 tokens. k1: 0. k2: ln(2)^2 / 4 = 0.1201132535.
    # k3: (ln 2 - 1/2 + 1 - ln 2) / 4 = 0.125. Gradients per token: 1, d, 1 - exp(-d), over 4.
    ref_logprobs, mask = f64([[-2 * LN2, -LN2, -1.0]]), torch.tensor([[True, True, False]])
    expected = {
        "k1": (0.0, [[0.25, 0.25, 0.0]]),
        "k2": (0.12011325347955035, [[LN2 / 4, -LN2 / 4, 0.0]]),
        "k3": (0.125, [[0.125, -0.25, 0.0]]),
    }
    for estimator, (loss, gradient) in expected.items():
        new_logprobs = f64([[-LN2, -2 * LN2, -5.0]]).requires_grad_()
        output = losses.kl_loss(new_logprobs, ref_logprobs, mask, estimator=estimator, num_tokens=4)
        close(output.loss, loss)
        output.loss.backward()
        close(new_logprobs.grad, gradient)


# Two responses of 2 and 4 tokens, 6 in all: weights 6 / (2 * 2) = 1.5 and 6 / (2 * 4) = 0.75 make it the mean of means.
TWO = torch.arange(4) < torch.tensor([[2], [4]])
MEAN_OF_MEANS = f64([1.5, 0.75])


def test_policy_loss_with_row_weights():
    # Ratio 1. Means of the advantages: (1 + 3) / 2 = 2 and (2 + 2 + 2 + 6) / 4 = 3; their mean 2.5, so the loss -2.5.
    # Without weights it is -16 / 6. The gradient of a token is -A * weight / 6.
    logprobs, advantages = f64([[-1.0, -1, math.nan, 7], [-1, -1, -1, -1]]), f64([[1.0, 3, 5, math.nan], [2, 2, 2, 6]])
    new_logprobs = logprobs.clone().requires_grad_()
    output = losses.ppo_policy_loss(
        new_logprobs, logprobs, advantages, TWO, clip_range=0.2, num_tokens=6, row_weights=MEAN_OF_MEANS
    )
    close(output.loss, -2.5)
    output.loss.backward()
    close(new_logprobs.grad, [[-0.25, -0.75, 0.0, 0.0], [-0.25, -0.25, -0.25, -0.75]])
    # One of two tokens of the first row and none of the second is held: a sixth, whatever the weights.
    moved = logprobs + f64([[2.0, 1, 1, 1], [1, 1, 1, 1]]).log()
    output = losses.ppo_policy_loss(
        moved, logprobs, advantages, TWO, clip_range=0.2, num_tokens=6, row_weights=MEAN_OF_MEANS
    )
    close(output.metrics["ppo/clip_frac"], 1 / 6, 1e-7)
    narrow = [tensor.float() for tensor in (logprobs, logprobs, advantages)]
    output = losses.ppo_policy_loss(*narrow, TWO, clip_range=0.2, num_tokens=6, row_weights=MEAN_OF_MEANS)
    assert output.loss.dtype == torch.float32


def test_other_losses_with_row_weights():
    # Entropies: means 2 and 3, as above. Log-ratios d of 1, 3 and of 2, 2, 2, 4: k2 = d^2 / 2, means 2.5 and 3.5.
    entropy = f64([[1.0, 3, 9, 9], [2, 2, 2, 6]])
    close(losses.entropy_bonus(entropy, TWO, num_tokens=6, row_weights=MEAN_OF_MEANS).loss, -2.5)
    ref_logprobs = -f64([[1.0, 3, 9, 9], [2, 2, 2, 4]])
    zeros = torch.zeros(2, 4, dtype=torch.float64)
    output = losses.kl_loss(zeros, ref_logprobs, TWO, estimator="k2", num_tokens=6, row_weights=MEAN_OF_MEANS)
    close(output.loss, 3.0)


def test_sft_loss():
    # Probabilities 1/2 and 1/4, one token of padding, 6 tokens in the whole minibatch: 3 ln 2 / 6 = ln(2) / 2.
    logprobs, mask = f64([[-LN2, -2 * LN2, -9.0]]), torch.tensor([[True, True, False]])
    close(losses.sft_loss(logprobs, mask, num_tokens=6).loss, LN2 / 2)


def test_ranking_loss():
    # Margins ln 3, 0, -ln 3, ln 3: sigmoid 3/4, 1/2, 1/4, 3/4. -ln: 0.2876820725, 0.6931471806, 1.3862943611,
    # 0.2876820725, together 2.6548056867; 4 of the minibatch's 8 pairs: 0.3318507108.
    # Right: 1 + 1/2 + 0 + 1 = 2.5 of 8. Margin: ln 3 of 8. Gradient: -(1 - sigmoid) / 8.
    chosen_scores = f64([LN3, 1.0, 0.0, 5.0 + LN3]).requires_grad_()
    rejected_scores = f64([0.0, 1.0, LN3, 5.0])
    output = losses.ranking_loss(chosen_scores, rejected_scores, num_pairs=8)
    close(output.loss, 0.3318507108293121)
    close(output.metrics["train/pair_accuracy"], 0.3125, 1e-7)
    close(output.metrics["train/margin"], LN3 / 8)
    output.loss.backward()
    close(chosen_scores.grad, [-0.03125, -0.0625, -0.09375, -0.03125])


def test_ranking_loss_is_stable_and_sees_only_differences():
    # A margin of -1000 costs 1000 (log(sigmoid) would be log 0); one of 1000 costs nothing.
    chosen_scores, rejected_scores = f64([-1000.0, 1000.0]).requires_grad_(), f64([0.0, 0.0])
    output = losses.ranking_loss(chosen_scores, rejected_scores, num_pairs=2)
    close(output.loss, 500.0)
    output.loss.backward()
    close(chosen_scores.grad, [-0.5, 0.0])
    shifted = losses.ranking_loss(f64([3.0, 1.0]) + 64, f64([1.0, 2.0]) + 64, num_pairs=2)
    close(shifted.loss, losses.ranking_loss(f64([3.0, 1.0]), f64([1.0, 2.0]), num_pairs=2).loss.item())


# The invariances, on four rows of up to five tokens. Each case: number of [b, r] tensors, settings.
MASK = torch.arange(5) < torch.tensor([[5], [2], [1], [3]])
CASES = {
    "ppo_policy_loss": (3, {"clip_range": 0.2}),
    "ppo_value_loss": (3, {"clip_range": 0.2}),
    "entropy_bonus": (1, {}),
    "kl_loss": (2, {"estimator": "k3"}),
    "sft_loss": (1, {}),
}
NUM_TOKENS = 11  # 5 + 2 + 1 + 3


def random_tensors(name):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 5, dtype=torch.float64, generator=generator) for _ in range(CASES[name][0])]


def run(name, tensors, mask=MASK, num_tokens=NUM_TOKENS):
    """The loss's output and the gradient of its first argument."""
    first = tensors[0].clone().requires_grad_()
    output = getattr(losses, name)(first, *tensors[1:], mask, num_tokens=num_tokens, **CASES[name][1])
    output.loss.backward()
    return output, first.grad


def assert_same(name, outputs, expected):
    """The micro-batches' outputs together are the minibatch's; `_max` and `_min` combine by that, the rest adds up."""
    assert_close(sum(output.loss for output in outputs), expected.loss, rtol=0, atol=1e-10)
    for key, value in expected.metrics.items():
        parts = torch.stack([output.metrics[key] for output in outputs])
        together = parts.max() if key.endswith("_max") else parts.min() if key.endswith("_min") else parts.sum()
        assert_close(together, value, rtol=0, atol=1e-6)
        assert not value.requires_grad


@pytest.mark.parametrize("name", sorted(CASES))
def test_padding_never_matters(name):
    tensors = random_tensors(name)
    expected, expected_gradient = run(name, tensors)
    assert expected_gradient[~MASK].eq(0).all()
    # 1e4 is finite but its exponential is not; every tensor holds the garbage, then one of them at a time.
    for garbage in (math.nan, math.inf, -math.inf, 1e4, -1e4):
        spoiled = [torch.where(MASK, tensor, garbage) for tensor in tensors]
        variants = [spoiled] + [[*tensors[:i], spoiled[i], *tensors[i + 1 :]] for i in range(len(tensors))]
        for variant in variants:
            output, gradient = run(name, variant)
            assert_same(name, [output], expected)
            assert_close(gradient, expected_gradient, rtol=0, atol=1e-10)
    # Nor does the number of padding columns.
    longer = [torch.cat([tensor, torch.full((4, 2), math.nan, dtype=torch.float64)], dim=1) for tensor in tensors]
    output, gradient = run(name, longer, torch.cat([MASK, torch.zeros(4, 2, dtype=torch.bool)], dim=1))
    assert_same(name, [output], expected)
    assert_close(gradient[:, :5], expected_gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", sorted(CASES))
def test_micro_batches_add_up(name):
    tensors = random_tensors(name)
    expected, expected_gradient = run(name, tensors)
    for rows in (1, 2, 3):
        chunks = [slice(start, start + rows) for start in range(0, 4, rows)]
        parts = [run(name, [tensor[chunk] for tensor in tensors], MASK[chunk]) for chunk in chunks]
        assert_same(name, [output for output, _ in parts], expected)
        assert_close(torch.cat([gradient for _, gradient in parts]), expected_gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", sorted(CASES))
def test_row_order_never_matters(name):
    tensors = random_tensors(name)
    expected, expected_gradient = run(name, tensors)
    order = torch.tensor([2, 0, 3, 1])
    output, gradient = run(name, [tensor[order] for tensor in tensors], MASK[order])
    assert_same(name, [output], expected)
    assert_close(gradient, expected_gradient[order], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_micro_batch_without_tokens_costs_nothing(name):
    output, gradient = run(name, random_tensors(name), torch.zeros_like(MASK))
    assert output.loss == 0
    assert gradient.eq(0).all()


def test_ranking_loss_adds_up_in_any_order():
    chosen_scores, rejected_scores = f64([1.0, -2.0, 0.5, 3.0]), f64([0.0, 1.0, 0.5, -1.0])
    expected = losses.ranking_loss(chosen_scores, rejected_scores, num_pairs=4)
    shuffled = torch.tensor([3, 1, 0, 2])
    for parts in (shuffled.split(1), shuffled.split(3), (shuffled,)):
        outputs = [losses.ranking_loss(chosen_scores[part], rejected_scores[part], num_pairs=4) for part in parts]
        assert_same("ranking_loss", outputs, expected)
