"""The mathematics of one tile of logits against numbers worked out by hand, and against torch's own softmax."""

import math

import torch
from torch.testing import assert_close

from hydra_rlhf.model import online_softmax

LN2 = math.log(2)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, atol=1e-12):
    assert_close(actual, f64(expected), rtol=0, atol=atol)


def shaping(scale=1.0, softcap=None, temperature=1.0):
    return online_softmax.LogitShaping(scale=scale, softcap=softcap, temperature=temperature)


def folded(products, targets, widths, how=None):
    """The statistics of rows whose columns come in tiles of these widths."""
    softmax = online_softmax.RunningSoftmax.empty(len(products), dtype=products.dtype, device=products.device)
    start = 0
    for width in widths:
        softmax.fold_(products[:, start : start + width].clone(), targets - start, how or shaping())
        start += width
    assert start == products.shape[1]
    return softmax


def gradient(softmax, products, targets, widths, grad_logprobs, grad_entropy=None, how=None):
    """The gradient of the products, tile by tile."""
    parts, start = [], 0
    for width in widths:
        tile = products[:, start : start + width].clone()
        parts.append(softmax.gradient(tile, targets - start, how or shaping(), grad_logprobs, grad_entropy))
        start += width
    return torch.cat(parts, dim=1)


def naive(products, targets, scale, softcap, temperature):
    """Log-prob and entropy by torch's own log-softmax."""
    logits = scale * products
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = torch.log_softmax(logits / temperature, dim=1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(dim=1)


# Logits ln 1, ln 2, ln 1: probabilities 1/4, 1/2, 1/4; entropy 1/4 ln 4 + 1/2 ln 2 + 1/4 ln 4 = 3/2 ln 2.
LOGITS = f64([[0.0, LN2, 0.0]])
WIDTHS = [(3,), (2, 1), (1, 2), (1, 1, 1)]


def test_statistics_by_hand():
    # Peak ln 2; exp(x - peak) = 1/2, 1, 1/2, so 2 in all; weighted: -ln 2 / 2 - 0 - ln 2 / 2 = -ln 2.
    for widths in WIDTHS:
        softmax = folded(LOGITS, torch.tensor([1]), widths)
        close(softmax.peak, [LN2])
        close(softmax.total, [2.0])
        close(softmax.weighted, [-LN2])
        close(softmax.target_logit, [LN2])


def test_logprob_and_entropy_by_hand():
    for widths in WIDTHS:
        for target, logprob in ((0, -2 * LN2), (1, -LN2), (2, -2 * LN2)):
            softmax = folded(LOGITS, torch.tensor([target]), widths)
            close(softmax.logprobs(), [logprob])
            close(softmax.entropy(), [1.5 * LN2])


def test_gradient_by_hand():
    # d logprob / dx = [x is the target's] - p. d entropy / dx = -p (log p + entropy):
    #   -1/4 (-2 ln 2 + 3/2 ln 2) = ln(2) / 8, and -1/2 (-ln 2 + 3/2 ln 2) = -ln(2) / 4.
    one, three = f64([1.0]), f64([3.0])
    by_entropy = f64([LN2 / 8, -LN2 / 4, LN2 / 8])
    for widths in WIDTHS:
        for target, by_logprob in ((0, [0.75, -0.5, -0.25]), (1, [-0.25, 0.5, -0.25]), (2, [-0.25, -0.5, 0.75])):
            targets = torch.tensor([target])
            softmax = folded(LOGITS, targets, widths)
            close(gradient(softmax, LOGITS, targets, widths, one), [by_logprob])
            expected = 3.0 * f64(by_logprob) + by_entropy
            close(gradient(softmax, LOGITS, targets, widths, three, one), expected[None].tolist())


def test_each_row_has_its_own_gradient():
    rows, targets = LOGITS.expand(2, 3), torch.tensor([1, 1])
    softmax = folded(rows, targets, (3,))
    close(gradient(softmax, rows, targets, (3,), f64([1.0, -2.0])), [[-0.25, 0.5, -0.25], [0.5, -1.0, 0.5]])


def test_scale_and_temperature_by_hand():
    # Products 0, ln(2) / 6, 0 times the scale 3 over the temperature 1/2 are the logits; their gradient is 6 times.
    products, targets, how = LOGITS / 6, torch.tensor([1]), shaping(scale=3.0, temperature=0.5)
    softmax = folded(products, targets, (2, 1), how)
    close(softmax.logprobs(), [-LN2])
    close(softmax.target_logit, [LN2])
    close(gradient(softmax, products, targets, (2, 1), f64([1.0]), None, how), [[-1.5, 3.0, -1.5]])


def test_softcap_by_hand():
    # 2 tanh(z / 2) = ln 2 at z = 2 atanh(ln(2) / 2), where its slope is 1 - (ln(2) / 2)^2 = 0.8798867...; 1 at zero.
    products, targets, how = f64([[0.0, 2 * math.atanh(LN2 / 2), 0.0]]), torch.tensor([1]), shaping(softcap=2.0)
    softmax = folded(products, targets, (1, 2), how)
    close(softmax.logprobs(), [-LN2])
    close(softmax.entropy(), [1.5 * LN2])
    slope = 1 - LN2**2 / 4
    close(gradient(softmax, products, targets, (1, 2), f64([1.0]), None, how), [[-0.25, 0.5 * slope, -0.25]])
    expected = [[LN2 / 8, -LN2 / 4 * slope, LN2 / 8]]
    close(gradient(softmax, products, targets, (1, 2), f64([0.0]), f64([1.0]), how), expected)


def test_scale_cap_and_temperature_come_in_this_order():
    # 3 * 2 = 6, capped 4 tanh(6 / 4) = 3.620593..., over 0.5 = 7.241187...
    tile = f64([2.0])
    close(shaping(scale=3.0, softcap=4.0, temperature=0.5).apply_(tile), [8 * math.tanh(1.5)])
    # Slope: 3 (1 - tanh(1.5)^2) / 0.5.
    pulled = shaping(scale=3.0, softcap=4.0, temperature=0.5).pull_back_(f64([1.0]), tile)
    close(pulled, [6 * (1 - math.tanh(1.5) ** 2)])


def test_against_log_softmax():
    generator = torch.Generator().manual_seed(0)
    products = 3 * torch.randn(6, 50, generator=generator, dtype=torch.float64)
    targets = torch.tensor([0, 6, 7, 20, 21, 49])  # the first and last column, and both sides of two borders
    widths = (7, 14, 29)
    grads = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    for scale, softcap, temperature in ((1.0, None, 1.0), (0.3, None, 0.7), (1.0, 2.5, 1.0), (0.3, 2.5, 1.7)):
        how = shaping(scale, softcap, temperature)
        leaf = products.clone().requires_grad_()
        logprobs, entropy = naive(leaf, targets, scale, softcap, temperature)
        softmax = folded(products, targets, widths, how)
        close(softmax.logprobs(), logprobs.tolist())
        close(softmax.entropy(), entropy.tolist())
        (expected,) = torch.autograd.grad((logprobs * grads[0]).sum(), leaf, retain_graph=True)
        close(gradient(softmax, products, targets, widths, grads[0], None, how), expected.tolist())
        (expected,) = torch.autograd.grad((logprobs * grads[0] + entropy * grads[1]).sum(), leaf)
        close(gradient(softmax, products, targets, widths, grads[0], grads[1], how), expected.tolist())


def test_the_order_of_tiles_does_not_matter():
    # The peak comes in the first, the middle and the last tile; 200 apart, so that what came before vanishes.
    for order in ([400.0, 200.0, 0.0], [200.0, 400.0, 0.0], [0.0, 200.0, 400.0]):
        softmax = folded(f64([order]), torch.tensor([1]), (1, 1, 1))
        close(softmax.logprobs(), [order[1] - 400.0])
        close(softmax.entropy(), [0.0])


def test_negative_logits_only():
    # All logits -5: probabilities 1/3 each. A peak that started at zero would stay there.
    softmax = folded(f64([[-5.0, -5.0, -5.0]]), torch.tensor([2]), (1, 2))
    close(softmax.peak, [-5.0])
    close(softmax.logprobs(), [-math.log(3)])
    close(softmax.entropy(), [math.log(3)])


def test_huge_logits_in_float32():
    # Products 8192 and 2**-10 less, at a temperature of 2**-10 (about 1e-3): logits 8388608 and 8388607, one apart, and
    # float32 knows whole numbers only there. p = 1 / (1 + 1/e); log-probs -ln(1 + 1/e) = -0.3132617 and one less;
    # entropy 0.3132617 + (1 - p) = 0.3132617 + 0.2689414.
    products, how = torch.tensor([[8192.0, 8192.0 - 2**-10]]), shaping(temperature=2**-10)
    for target, logprob in ((0, -0.3132617), (1, -1.3132617)):
        for widths in ((2,), (1, 1)):
            softmax = folded(products, torch.tensor([target]), widths, how)
            assert_close(softmax.logprobs(), torch.tensor([logprob]), rtol=0, atol=1e-6)
            assert_close(softmax.entropy(), torch.tensor([0.5822031]), rtol=0, atol=1e-6)
            found = gradient(softmax, products, torch.tensor([target]), widths, torch.ones(1), None, how)
            expected = torch.tensor([[0.2689414, -0.2689414] if target == 0 else [-0.7310586, 0.7310586]])
            assert_close(found, 1024 * expected, rtol=1e-6, atol=0)


def test_numbers_that_are_not_finite_are_not_hidden():
    # A run stops on a loss that is not finite, so it has to see it.
    for bad in (math.nan, math.inf):
        for place in range(3):
            row = [0.0, 1.0, 2.0]
            row[place] = bad
            softmax = folded(f64([row]), torch.tensor([0]), (1, 1, 1))
            assert not softmax.logprobs().isfinite().any()
            assert not softmax.entropy().isfinite().any()


def test_folding_into_a_view_of_some_rows():
    softmax = online_softmax.RunningSoftmax.empty(3, dtype=torch.float64, device=torch.device("cpu"))
    softmax.rows(slice(1, 2)).fold_(LOGITS.clone(), torch.tensor([1]), shaping())
    close(softmax.total, [0.0, 2.0, 0.0])
    close(softmax.weighted, [0.0, -LN2, 0.0])
    close(softmax.target_logit, [0.0, LN2, 0.0])
    close(softmax.rows(slice(1, 3)).peak[:1], [LN2])
