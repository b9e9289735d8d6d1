"""Rewards, shaping and running moments against numbers worked out by hand."""

import dataclasses
import json
import math

import pytest
import torch
from torch.testing import assert_close

from hydra_rlhf.algorithms import rewards

NAN, INF = math.nan, math.inf


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


MASK = torch.tensor([[True, True, True, False], [True, False, False, False], [True, True, True, True]])


def test_score_lands_on_the_last_counted_token():
    placed = rewards.place_at_last_token(f64([5.0, -1.0, 2.0]), MASK)
    assert_close(placed, f64([[0, 0, 5, 0], [-1, 0, 0, 0], [0, 0, 0, 2]]), rtol=0, atol=0)


def test_a_response_without_tokens_is_refused():
    with pytest.raises(AssertionError, match="counts nothing"):
        rewards.place_at_last_token(f64([1.0]), torch.tensor([[False, False]]))


def test_token_rewards():
    # Row 1: dense 1, 0, 0.5 leave 5 - 1.5 = 3.5 for the last token. With kl_coef 0.5:
    #   1 - 0.05 = 0.95, 0 - 0.1 = -0.1, 0.5 + 0.15 + 3.5 = 4.15
    # Row 2: dense 0.25 leaves 0.75: 0.25 + 0.75 - 0.2 = 0.8. Row 3: no dense rewards, no KL, score -2 at the end.
    scores = f64([5.0, 1.0, -2.0])
    dense = f64([[1.0, 0.0, 0.5, NAN], [0.25, INF, NAN, 3.0], [0.0, 0.0, 0.0, 0.0]])
    kl = f64([[0.1, 0.2, -0.3, NAN], [0.4, NAN, INF, 7.0], [0.0, 0.0, 0.0, 0.0]])
    expected = f64([[0.95, -0.1, 4.15, 0.0], [0.8, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -2.0]])
    assert_close(rewards.token_rewards(scores, dense, kl, MASK, kl_coef=0.5), expected, rtol=0, atol=1e-10)


def test_rewards_of_a_row_add_up_to_score_minus_kl():
    # Row 1: 5 - 0.1 * (1 + 2 + 3) = 4.4; row 2: 1 - 0.1 * 4 = 0.6; row 3: -2 - 0.1 * (1 - 1 + 2 - 2) = -2.
    scores = f64([5.0, 1.0, -2.0])
    dense = f64([[9.0, -3.0, 0.5, 0.0], [0.25, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    kl = f64([[1.0, 2.0, 3.0, 50.0], [4.0, 50.0, 50.0, 50.0], [1.0, -1.0, 2.0, -2.0]])
    totals = rewards.token_rewards(scores, dense, kl, MASK, kl_coef=0.1).sum(dim=1)
    assert_close(totals, f64([4.4, 0.6, -2.0]), rtol=0, atol=1e-10)


def test_row_order_and_padding_do_not_change_rewards():
    scores, dense, kl = f64([5.0, 1.0, -2.0]), 0.1 * MASK.double(), 0.2 * MASK.double()
    whole = rewards.token_rewards(scores, dense, kl, MASK, kl_coef=0.5)
    order = torch.tensor([2, 0, 1])
    shuffled = rewards.token_rewards(scores[order], dense[order], kl[order], MASK[order], kl_coef=0.5)
    assert_close(shuffled, whole[order], rtol=0, atol=1e-10)
    # Two more columns of padding that hold NaN.
    padding = torch.full((3, 2), NAN, dtype=torch.float64)
    longer_mask = torch.cat([MASK, torch.zeros(3, 2, dtype=torch.bool)], dim=1)
    longer = rewards.token_rewards(
        scores, torch.cat([dense, padding], dim=1), torch.cat([kl, padding], dim=1), longer_mask, kl_coef=0.5
    )
    assert_close(longer, torch.cat([whole, torch.zeros_like(padding)], dim=1), rtol=0, atol=1e-10)


def test_shape_scores():
    # Scale 2: 2, -3, 0.5, 5. Clip 2: 2, -2, 0.5, 2. Responses 2 and 3 have not ended, penalty 1: -3, -0.5.
    scores, ended = f64([4.0, -6.0, 1.0, 10.0]), torch.tensor([True, False, False, True])
    shaped = rewards.shape_scores(scores, ended, clip=2.0, missing_eos_penalty=1.0, scale=2.0)
    assert_close(shaped, f64([2.0, -3.0, -0.5, 2.0]), rtol=0, atol=1e-10)


def test_shape_scores_without_anything_to_do():
    scores, ended = f64([4.0, -6.0]), torch.tensor([True, False])
    shaped = rewards.shape_scores(scores, ended, clip=None, missing_eos_penalty=0.0, scale=1.0)
    assert_close(shaped, scores, rtol=0, atol=0)


def test_moments():
    # 1, 2, 4: mean 7/3, squared deviations (16 + 1 + 25) / 9 = 14/3. With 7 and 6: mean 4, 9 + 4 + 0 + 9 + 4 = 26.
    first = rewards.update_moments(rewards.Moments(), f64([1.0, 2.0, 4.0]))
    assert first.count == 3
    assert math.isclose(first.mean, 7 / 3, rel_tol=1e-12)
    assert math.isclose(first.m2, 14 / 3, rel_tol=1e-12)
    both = rewards.update_moments(first, f64([7.0, 6.0]))
    assert both.count == 5
    assert math.isclose(both.mean, 4.0, rel_tol=1e-12)
    assert math.isclose(both.m2, 26.0, rel_tol=1e-12)
    assert math.isclose(both.variance, 5.2, rel_tol=1e-12)
    assert math.isclose(both.scale, math.sqrt(5.2), rel_tol=1e-12)


def test_moments_of_a_small_spread_far_from_zero():
    # 1e8, 1e8 + 1, 1e8 + 2 one at a time: m2 = 1 + 0 + 1. A sum of squares (3e16) would lose it in float32.
    moments = rewards.Moments()
    for value in (1e8, 1e8 + 1, 1e8 + 2):
        moments = rewards.update_moments(moments, f64([value]))
    assert math.isclose(moments.m2, 2.0, rel_tol=1e-6)


def test_float32_scores_are_added_up_in_float64():
    # 16,777,217 = 2^24 + 1 is not a float32: summed in float32, the mean of 2^24, 1 and 1 would be off by 1/3.
    moments = rewards.update_moments(rewards.Moments(), torch.tensor([2.0**24, 1.0, 1.0]))
    assert math.isclose(moments.mean, (2**24 + 2) / 3, rel_tol=1e-12)


def test_equal_scores_have_no_scale():
    assert rewards.Moments().scale == 1.0
    assert rewards.Moments().variance == 0.0
    moments = rewards.Moments()
    for _ in range(3):
        moments = rewards.update_moments(moments, f64([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]))
    assert moments.scale == 1.0


def test_scores_that_are_not_finite_are_left_out():
    before = rewards.update_moments(rewards.Moments(), f64([1.0, 2.0]))
    assert rewards.update_moments(before, f64([NAN, INF])) == before
    assert rewards.update_moments(before, f64([NAN, 3.0])) == rewards.update_moments(before, f64([3.0]))


def test_moments_survive_json():
    moments = rewards.update_moments(rewards.Moments(), f64([0.1, 0.2, 0.7]))
    assert rewards.Moments(**json.loads(json.dumps(dataclasses.asdict(moments)))) == moments
