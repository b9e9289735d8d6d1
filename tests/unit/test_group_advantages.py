"""Advantages without a critic against examples worked out by hand."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hydra_rlhf.algorithms import group_advantages

NAN, INF = math.nan, math.inf


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


# Summed rewards of the rows: 3, 4, 0, 2, 6, none (left out), 6. Prompt 7 has rows 0, 2, 4 (and 5), prompt 3 rows 1 and
# 3, prompt 9 row 6 alone. What stands in padding is garbage.
REWARDS = f64(
    [
        [1.0, 0.0, 2.0],
        [4.0, NAN, NAN],
        [-1.0, 1.0, INF],
        [0.0, 1.0, 1.0],
        [5.0, 1.0, -INF],
        [NAN, 100.0, INF],
        [2.0, 2.0, 2.0],
    ]
)
MASK = torch.arange(3) < torch.tensor([[3], [1], [2], [3], [2], [0], [3]])
GROUPS = torch.tensor([7, 3, 7, 3, 7, 7, 9])


def check(actual, rows, tolerance=1e-10):
    """The same number at every token of a row, 0 outside."""
    expected = torch.where(MASK, f64(rows)[:, None], 0.0)
    assert_close(actual, expected, rtol=0, atol=tolerance)


def test_rloo():
    # Prompt 7: 3 - (0 + 6) / 2 = 0; 0 - (3 + 6) / 2 = -4.5; 6 - (3 + 0) / 2 = 4.5. Prompt 3: 4 - 2 = 2; 2 - 4 = -2.
    # Prompt 9 has nothing to be compared with.
    check(group_advantages.rloo(REWARDS, MASK, GROUPS), [0.0, 2.0, -4.5, -2.0, 4.5, 0.0, 0.0])


def test_grpo():
    # Prompt 7: mean 3, variance (0 + 9 + 9) / 3 = 6: 0, -3 / sqrt 6 = -1.2247448714, 1.2247448714.
    # Prompt 3: mean 3, variance 1: 1 and -1. Prompt 9: 0. The floor of the variance, 1e-8, is in the tolerance.
    root = 1.224744871391589
    check(group_advantages.grpo(REWARDS, MASK, GROUPS), [0.0, 1.0, -root, -1.0, root, 0.0, 0.0], 1e-8)


def test_dr_grpo():
    # Prompt 7: mean 3. Prompt 3: mean 3. Prompt 9: mean 6.
    check(group_advantages.dr_grpo(REWARDS, MASK, GROUPS), [0.0, 1.0, -3.0, -1.0, 3.0, 0.0, 0.0])


def test_equal_responses_teach_nothing():
    # In float32 the mean of 7 times 0.1 is off by a rounding error, which a division by sqrt(1e-8) makes 1e-4 of.
    rewards, groups = torch.full((7, 1), 0.1), torch.zeros(7, dtype=torch.long)
    for estimator in (group_advantages.rloo, group_advantages.grpo, group_advantages.dr_grpo):
        found = estimator(rewards, torch.ones(7, 1).bool(), groups)
        assert found.abs().max() < 1e-9
        assert found.dtype == torch.float32


def test_flat_groups():
    # Prompts 7 and 3 differ; prompt 9 has one response and does not count.
    assert group_advantages.flat_group_frac(REWARDS, MASK, GROUPS) == 0.0
    # Prompt 3 has 1 and 0 + 1 (equal, and a row without a token), prompt 7 has 1, 1 and 2, prompt 9 one alone: 1 of 2.
    rewards = torch.tensor([[1.0, NAN], [0.0, 1.0], [1.0, NAN], [1.0, 0.0], [2.0, NAN], [5.0, 5.0], [9.0, NAN]])
    mask = torch.arange(2) < torch.tensor([[1], [2], [1], [2], [1], [2], [0]])
    groups = torch.tensor([3, 3, 7, 7, 7, 9, 3])
    assert abs(group_advantages.flat_group_frac(rewards, mask, groups) - 0.5) < 1e-12
    # A difference of 1e-5 each way is none.
    rewards[1, 1] = 1.00002
    assert abs(group_advantages.flat_group_frac(rewards, mask, groups) - 0.5) < 1e-12
    assert group_advantages.flat_group_frac(rewards[5:6], mask[5:6], groups[5:6]).isnan()


def test_remax():
    # Still to come: 3, 2, 2; 4; 0, 1; 2, 2, 1; 6, 1; none; 6, 4, 2. Greedy scores 2.5, 4, -1, 0, 6, (garbage), 1.
    found = group_advantages.remax(REWARDS, MASK, f64([2.5, 4.0, -1.0, 0.0, 6.0, NAN, 1.0]))
    expected = f64(
        [
            [0.5, -0.5, -0.5],
            [0.0, 0.0, 0.0],
            [1.0, 2.0, 0.0],
            [2.0, 2.0, 1.0],
            [0.0, -5.0, 0.0],
            [0.0, 0.0, 0.0],
            [5.0, 3.0, 1.0],
        ]
    )
    assert_close(found, expected, rtol=0, atol=1e-10)


def test_returns_to_go():
    # Discount 0.5. Row 0: 2; 0 + 0.5 * 2 = 1; 1 + 0.5 * 1 = 1.5. Row 2: 1; -1 + 0.5 = -0.5.
    found = group_advantages.returns_to_go(REWARDS[[0, 2]], MASK[[0, 2]], discount=0.5)
    assert_close(found, f64([[1.5, 1.0, 2.0], [-0.5, 1.0, 0.0]]), rtol=0, atol=1e-10)


def test_reinforce_plus_plus():
    # The five numbers above: mean 1, deviations 0.5, 0, 1, -1.5, 0, variance (0.25 + 1 + 2.25) / 5 = 0.7, root 0.83666.
    found = group_advantages.reinforce_plus_plus(REWARDS[[0, 2, 5]], MASK[[0, 2, 5]], discount=0.5)
    expected = [[0.5976143046671968, 0.0, 1.1952286093343936], [-1.7928429140015904, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert_close(found, f64(expected), rtol=0, atol=1e-7)


def test_nothing_is_differentiated():
    half = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    mask, groups = torch.ones(2, 3).bool(), torch.zeros(2, dtype=torch.long)
    found = [
        group_advantages.rloo(half, mask, groups),
        group_advantages.grpo(half, mask, groups),
        group_advantages.dr_grpo(half, mask, groups),
        group_advantages.remax(half, mask, torch.zeros(2)),
        group_advantages.reinforce_plus_plus(half, mask, discount=1.0),
    ]
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in found)


@settings(max_examples=25)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 2), st.integers(-64, 64), st.integers(0, 3)), min_size=1, max_size=7
    ),  # (prompt, reward of each token, length)
    order=st.randoms(use_true_random=False),
)
def test_groups_are_compared_within_themselves(rows, order):
    """Advantages of a prompt add up to nothing, a row alone gets none, and neither order nor level matters."""
    prompt, reward, length = (torch.tensor(column) for column in zip(*rows, strict=True))
    mask = torch.arange(3) < length[:, None]
    rewards = torch.where(mask, reward.double()[:, None] / 8, NAN)
    shuffled = list(range(len(rows)))
    order.shuffle(shuffled)
    for estimator in (group_advantages.rloo, group_advantages.grpo, group_advantages.dr_grpo):
        found = estimator(rewards, mask, prompt)
        each = found[:, 0]
        for number in prompt.unique():
            own = each[(prompt == number) & (length > 0)]
            assert abs(own.sum()) < 1e-6
            assert len(own) != 1 or own.item() == 0.0
        assert_close(estimator(rewards[shuffled], mask[shuffled], prompt[shuffled]), found[shuffled], rtol=0, atol=1e-9)
        # Every response of every prompt worth 5 more.
        raised = rewards + torch.where(torch.arange(3) == 0, 5.0, 0.0)
        assert_close(estimator(raised, mask, prompt), found, rtol=0, atol=1e-9)
