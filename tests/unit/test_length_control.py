"""Length-controlled win rates: hand numbers, and truths that simulated judges were given."""

import math

import numpy as np
import pytest

from hydra_rlhf.evaluation import length_control


def study(n, intercept, slope, seed, *, shift=20.0):
    """Outcomes of a judge with P(win) = sigmoid(intercept + slope x tanh(d / s)), d about `shift` characters."""
    rng = np.random.default_rng(seed)
    ours, theirs = rng.normal(100 + shift, 30, n), rng.normal(100, 30, n)
    root_mean_square = math.sqrt(shift**2 + 2 * 30**2)
    chance = 1 / (1 + np.exp(-intercept - slope * np.tanh((ours - theirs) / root_mean_square)))
    return (rng.random(n) < chance).astype(float), ours, theirs


def test_length_terms():
    # Differences 3, -4, 0: root mean square sqrt(25 / 3) = 2.886751; tanh(1.039230), tanh(-1.385641), 0.
    terms = length_control.length_term(np.array([5.0, 1.0, 7.0]), np.array([2.0, 5.0, 7.0]))
    assert terms.tolist() == pytest.approx([0.777584, -0.882208, 0.0], abs=1e-5)
    # The same difference everywhere stays one: not taken for the usual one.
    assert length_control.length_term(np.full(4, 9.0), np.full(4, 7.0)).tolist() == pytest.approx([math.tanh(1.0)] * 4)
    assert length_control.length_term(np.full(3, 5.0), np.full(3, 5.0)).tolist() == [0.0] * 3


def test_without_a_length_difference_it_is_the_win_rate_with_half_a_win_and_half_a_loss():
    # 7 wins, 2 ties, 1 loss: 8 of 10; with the prior's half win and half loss 8.5 of 11.
    outcomes = np.array([1.0] * 7 + [0.5] * 2 + [0.0])
    same = np.full(10, 50.0)
    rate, (low, high) = length_control.length_controlled_win_rate(outcomes, same, same, np.arange(10), seed=0)
    assert rate == pytest.approx(8.5 / 11)
    assert low < rate < high
    assert (low, high) == pytest.approx((0.56, 0.93), abs=0.05)


def test_a_judge_that_sees_only_length_is_seen_through():
    # Longer wins always; ours is mostly the longer one. At equal length nothing is known: one half.
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(140, 30, 400), rng.normal(100, 30, 400)
    outcomes = (ours > theirs).astype(float)
    assert outcomes.mean() > 0.75
    rate, (low, high) = length_control.length_controlled_win_rate(outcomes, ours, theirs, np.arange(400), seed=0)
    assert rate == pytest.approx(0.5, abs=0.15)
    assert low < 0.5 < high


@pytest.mark.parametrize(("intercept", "slope"), [(0.0, 2.0), (1.0, -1.5), (-1.0, 0.0)])
def test_the_rate_at_equal_length_is_recovered(intercept, slope):
    outcomes, ours, theirs = study(20_000, intercept, slope, 1)
    rate, _ = length_control.length_controlled_win_rate(
        outcomes, ours, theirs, np.arange(20_000), num_resamples=2, seed=0
    )
    assert rate == pytest.approx(1 / (1 + math.exp(-intercept)), abs=0.015)


def test_the_model_of_two_groups_by_hand():
    # Terms 0 and 1 only, prior too light to matter, 200 each: 100 of 200 win at 0, 150 of 200 at 1. Without a penalty
    # a = 0, b = ln 3. The penalty b^2 / (2 x 2.5^2) takes b to where 50 - 200 s(a + b) + ... = 0.16 b:
    # (a, b) = (0.0, 1.0944) to first order (curvature 37.5 and 50 give a shift of 0.1758 x 0.0467 = 0.0082 in b).
    outcomes = np.array([1.0, 0.0] * 100 + [1.0, 1.0, 1.0, 0.0] * 50)
    terms = np.array([0.0] * 200 + [1.0] * 200)
    (found,) = length_control.fit_length_model(outcomes, terms, np.ones((1, 400)), np.full((1, 2), 1e-6))
    assert found.tolist() == pytest.approx([0.0035, math.log(3) - 0.0082], abs=5e-4)


def test_weights_stand_for_repetition():
    outcomes, ours, theirs = study(30, 0.5, 1.0, 3)
    terms = length_control.length_term(ours, theirs)
    weights = np.array([[1.0, 2.0, 0.0] * 10])
    (weighted,) = length_control.fit_length_model(outcomes, terms, weights, np.full((1, 2), 0.5))
    again = np.repeat(np.arange(30), weights[0].astype(int))
    (repeated,) = length_control.fit_length_model(outcomes[again], terms[again], np.ones((1, 30)), np.full((1, 2), 0.5))
    assert weighted.tolist() == pytest.approx(repeated.tolist(), abs=1e-9)


def test_swapping_the_sides_mirrors_the_rate():
    outcomes, ours, theirs = study(80, 0.7, 1.0, 4)
    rate, _ = length_control.length_controlled_win_rate(outcomes, ours, theirs, np.arange(80), seed=0)
    other, _ = length_control.length_controlled_win_rate(1 - outcomes, theirs, ours, np.arange(80), seed=0)
    assert other == pytest.approx(1 - rate, abs=1e-9)


def test_outcomes_of_one_prompt_are_weighted_together():
    # The same 40 outcomes four times over: the interval of 40 prompts, not that of 160, which is half as wide.
    outcomes, ours, theirs = study(40, 0.3, 0.0, 5)
    four = [np.tile(values, 4) for values in (outcomes, ours, theirs)]

    def width(values, prompts):
        _, (low, high) = length_control.length_controlled_win_rate(*values, prompts, seed=0)
        return high - low

    alone = width((outcomes, ours, theirs), np.arange(40))
    assert width(four, np.tile(np.arange(40), 4)) == pytest.approx(alone, rel=0.12)
    assert width(four, np.arange(160)) == pytest.approx(alone / 2, rel=0.15)


def test_runs_are_weighted_too_and_a_prompt_counts_once():
    # Run 0 wins 30 of 40, run 1 10 of 40, no lengths: 20 wins of 40 prompts. Two seeds are drawn one at a time, so the
    # rate is near 30.5 / 41 or 10.5 / 41 = 0.256, each with deviation 0.067 in half of the draws: 2.5 % of all lie
    # below the lower one's 5 %, 0.256 - 1.645 x 0.067 = 0.146. Prompts alone would give 0.5 +- 0.13.
    outcomes = np.array([1.0] * 30 + [0.0] * 10 + [1.0] * 10 + [0.0] * 30)
    same, prompts = np.full(80, 9.0), np.tile(np.arange(40), 2)
    runs = (np.repeat([0, 1], 40), np.zeros(80, dtype=int))
    rate, (low, high) = length_control.length_controlled_win_rate(outcomes, same, same, prompts, runs=runs, seed=0)
    assert rate == pytest.approx(0.5)
    assert low == pytest.approx(0.146, abs=0.025)
    assert high == pytest.approx(0.854, abs=0.025)
    # Both runs always win: 40 prompts and half a win and half a loss, 40.5 of 41.
    rate, _ = length_control.length_controlled_win_rate(np.ones(80), same, same, prompts, runs=runs, seed=0)
    assert rate == pytest.approx(40.5 / 41)


def test_intervals_cover_the_truth():
    # 120 studies of 60 prompts: 95 % +- 2 %.
    hits = 0
    for seed in range(120):
        outcomes, ours, theirs = study(60, 1.0, 1.0, (8, seed), shift=10.0)
        _, (low, high) = length_control.length_controlled_win_rate(
            outcomes, ours, theirs, np.arange(60), num_resamples=200, seed=seed
        )
        hits += low <= 1 / (1 + math.exp(-1.0)) <= high
    assert 0.88 < hits / 120 < 0.995
