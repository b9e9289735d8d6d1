"""Generalised advantage estimation against examples worked out by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from hydra_rlhf.algorithms import advantages

NAN, INF = math.nan, math.inf


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


# Row 1 has three tokens, row 2 (short) two; what stands in padding is garbage.
REWARDS = f64([[1.0, 0.0, 2.0, NAN], [-1.0, 3.0, INF, 5.0]])
VALUES = f64([[0.5, 1.0, 1.5, 9.0], [2.0, 1.0, NAN, -INF]])
MASK = torch.tensor([[True, True, True, False], [True, True, False, False]])


def check(discount, gae_lambda, expected_advantages, expected_returns):
    result = advantages.gae(REWARDS, VALUES, MASK, discount=discount, gae_lambda=gae_lambda)
    assert_close(result[0], f64(expected_advantages), rtol=0, atol=1e-10)
    assert_close(result[1], f64(expected_returns), rtol=0, atol=1e-10)


def test_three_steps():
    # discount 0.9, lambda 0.5, product 0.45.
    # Row 1: delta = 1 + 0.9 * 1 - 0.5 = 1.4; 0 + 0.9 * 1.5 - 1 = 0.35; 2 + 0 - 1.5 = 0.5
    #   advantages from the back: 0.5; 0.35 + 0.45 * 0.5 = 0.575; 1.4 + 0.45 * 0.575 = 1.65875
    # Row 2: delta = -1 + 0.9 * 1 - 2 = -2.1; 3 + 0 - 1 = 2: advantages 2; -2.1 + 0.45 * 2 = -1.2
    # Returns are these plus the values.
    check(
        0.9,
        0.5,
        [[1.65875, 0.575, 0.5, 0.0], [-1.2, 2.0, 0.0, 0.0]],
        [[2.15875, 1.575, 2.0, 0.0], [0.8, 3.0, 0.0, 0.0]],
    )


def test_lambda_one_gives_monte_carlo_returns():
    # Row 1: 2; 0 + 0.9 * 2 = 1.8; 1 + 0.9 * 1.8 = 2.62. Row 2: 3; -1 + 0.9 * 3 = 1.7.
    check(
        0.9,
        1.0,
        [[2.12, 0.8, 0.5, 0.0], [-0.3, 2.0, 0.0, 0.0]],
        [[2.62, 1.8, 2.0, 0.0], [1.7, 3.0, 0.0, 0.0]],
    )


def test_lambda_zero_gives_one_step_targets():
    # Row 1: 1 + 0.9 * 1 = 1.9; 0 + 0.9 * 1.5 = 1.35; 2. Row 2: -1 + 0.9 * 1 = -0.1; 3.
    check(
        0.9,
        0.0,
        [[1.4, 0.35, 0.5, 0.0], [-2.1, 2.0, 0.0, 0.0]],
        [[1.9, 1.35, 2.0, 0.0], [-0.1, 3.0, 0.0, 0.0]],
    )


def test_without_discount_returns_are_sums():
    # lambda 1, discount 1: what is still to come. Row 1: 3, 2, 2. Row 2: 2, 3.
    check(
        1.0,
        1.0,
        [[2.5, 1.0, 0.5, 0.0], [0.0, 2.0, 0.0, 0.0]],
        [[3.0, 2.0, 2.0, 0.0], [2.0, 3.0, 0.0, 0.0]],
    )


def test_a_perfect_critic_leaves_no_advantage():
    # Rewards 0, 0, 1 and values 0.81, 0.9, 1 at discount 0.9: every delta is 0, whatever lambda.
    result, returns = advantages.gae(
        f64([[0.0, 0.0, 1.0]]), f64([[0.81, 0.9, 1.0]]), torch.ones(1, 3).bool(), discount=0.9, gae_lambda=0.7
    )
    assert_close(result, f64([[0.0, 0.0, 0.0]]), rtol=0, atol=1e-10)
    assert_close(returns, f64([[0.81, 0.9, 1.0]]), rtol=0, atol=1e-10)


def test_rows_do_not_see_each_other():
    both = advantages.gae(REWARDS, VALUES, MASK, discount=0.9, gae_lambda=0.5)
    swapped = advantages.gae(REWARDS.flip(0), VALUES.flip(0), MASK.flip(0), discount=0.9, gae_lambda=0.5)
    assert_close(swapped[0].flip(0), both[0], rtol=0, atol=0)
    # The short row without its padding.
    alone = advantages.gae(REWARDS[1:, :2], VALUES[1:, :2], MASK[1:, :2], discount=0.9, gae_lambda=0.5)
    assert_close(alone[0][0], both[0][1, :2], rtol=0, atol=0)


def test_targets_are_fp32_and_carry_no_gradient():
    half = torch.ones(1, 3, dtype=torch.bfloat16, requires_grad=True)
    result = advantages.gae(half, half, torch.ones(1, 3).bool(), discount=1.0, gae_lambda=0.95)
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in result)


def test_gae_refuses_a_mask_with_holes():
    with pytest.raises(AssertionError, match="prefix"):
        advantages.gae(
            f64([[1.0, 1.0]]), f64([[0.0, 0.0]]), torch.tensor([[False, True]]), discount=1.0, gae_lambda=1.0
        )


def test_explained_variance():
    # Returns 1, 2, 6: variance 14/3. Values 1, 2, 3 leave residuals 0, 0, 3: variance 2, and 1 - 2 / (14/3) = 4/7.
    returns, mask = f64([[1.0, 2.0, 6.0, NAN]]), torch.tensor([[True, True, True, False]])
    explained = advantages.explained_variance(f64([[1.0, 2.0, 3.0, INF]]), returns, mask)
    assert_close(explained, f64(4 / 7), rtol=0, atol=1e-10)
    # A constant critic, however wrong its level, explains nothing; a perfect one (or one off by a constant) everything.
    assert_close(
        advantages.explained_variance(f64([[8.0, 8.0, 8.0, NAN]]), returns, mask), f64(0.0), rtol=0, atol=1e-10
    )
    assert_close(advantages.explained_variance(returns + 1, returns, mask), f64(1.0), rtol=0, atol=1e-10)
    # The opposite of the truth: residuals 2, 4, 12, twice the spread, four times the variance: 1 - 4 = -3.
    assert_close(advantages.explained_variance(-returns, returns, mask), f64(-3.0), rtol=0, atol=1e-10)


def test_equal_returns_have_no_variance_to_explain():
    returns = f64([[2.0, 2.0]])
    assert advantages.explained_variance(f64([[1.0, 3.0]]), returns, torch.ones(1, 2).bool()).isnan()
