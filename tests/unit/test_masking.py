"""Masked statistics against numbers worked out by hand, and what padding may hold."""

import math

import pytest
import torch
from torch.testing import assert_close

from hydra_rlhf.algorithms import masking

NAN, INF = math.nan, math.inf


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


# Counted: 1, 2, 6. Sum 9, mean 3, deviations -2, -1, 3, variance (4 + 1 + 9) / 3 = 14/3, standard deviation 2.16024690.
X = f64([[1.0, NAN, 2.0], [INF, 6.0, -INF]])
MASK = torch.tensor([[True, False, True], [False, True, False]])


def test_sum_mean_variance():
    assert_close(masking.masked_sum(X, MASK), f64(9.0), rtol=0, atol=1e-10)
    assert_close(masking.masked_mean(X, MASK), f64(3.0), rtol=0, atol=1e-10)
    assert_close(masking.masked_variance(X, MASK), f64(14 / 3), rtol=0, atol=1e-10)


def test_nothing_counts():
    nothing = torch.zeros_like(MASK)
    assert masking.masked_sum(X, nothing) == 0
    assert masking.masked_mean(X, nothing).isnan()
    assert masking.masked_variance(X, nothing).isnan()


def test_zero_outside_selects():
    assert_close(masking.zero_outside(X, MASK), f64([[1.0, 0.0, 2.0], [0.0, 6.0, 0.0]]), rtol=0, atol=0)


def test_gradients_ignore_what_is_outside():
    # d sum / dx = 1, d mean / dx = 1/3, d variance / dx = 2 (x - mean) / 3 = -4/3, -2/3, 2; always 0 outside.
    expected = {
        masking.masked_sum: [[1, 0, 1], [0, 1, 0]],
        masking.masked_mean: [[1 / 3, 0, 1 / 3], [0, 1 / 3, 0]],
        masking.masked_variance: [[-4 / 3, 0, -2 / 3], [0, 2, 0]],
    }
    for function, gradient in expected.items():
        x = X.clone().requires_grad_()
        function(x, MASK).backward()
        assert_close(x.grad, f64(gradient), rtol=0, atol=1e-10)


def test_zero_outside_stops_a_gradient_that_overflows():
    # exp(1000) is inf: selected away only afterwards, its gradient would be 0 * inf = NaN.
    x = f64([0.0, 1000.0]).requires_grad_()
    masking.zero_outside(x, torch.tensor([True, False])).exp().sum().backward()
    assert_close(x.grad, f64([1.0, 0.0]), rtol=0, atol=0)


def test_standardize():
    # (1 - 3, 2 - 3, 6 - 3) / 2.16024690 = -0.92582010, -0.46291005, 1.38873015
    expected = f64([[-0.9258201, 0.0, -0.46291005], [0.0, 1.38873015, 0.0]])
    assert_close(masking.standardize(X, MASK), expected, rtol=0, atol=1e-7)


def test_equal_entries_stay_finite():
    x = f64([[5.0, NAN, 5.0], [NAN, 5.0, NAN]])
    assert_close(masking.standardize(x, MASK), torch.zeros_like(x), rtol=0, atol=0)


def test_a_shift_and_a_scale_do_not_change_standardized_values():
    moved = 100 * X - 7
    assert_close(masking.standardize(moved, MASK), masking.standardize(X, MASK), rtol=0, atol=1e-7)


def test_last_true_index():
    mask = torch.tensor([[True, False, False], [True, True, True], [True, True, False]])
    assert masking.last_true_index(mask).tolist() == [0, 2, 1]


def test_last_true_index_refuses_other_masks():
    assert not masking.is_prefix(torch.tensor([[True, False, True]]))
    with pytest.raises(AssertionError, match="after one that does not"):
        masking.last_true_index(torch.tensor([[False, True]]))
    with pytest.raises(AssertionError, match="counts nothing"):
        masking.last_true_index(torch.tensor([[True, True], [False, False]]))
