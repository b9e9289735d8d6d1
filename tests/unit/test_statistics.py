"""Win rates, intervals and calibration against published and hand-worked numbers."""

import math

import pytest

from hydra_rlhf.evaluation import statistics

LN3 = 1.0986122886681098


def test_win_rate_counts_ties_half():
    # win, tie, loss, win: 2.5 of 4
    assert statistics.pair_outcomes([3, 1, 0, 2], [1, 1, 5, 0]) == [1.0, 0.5, 0.0, 1.0]
    assert statistics.win_rate([3, 1, 0, 2], [1, 1, 5, 0]) == 0.625
    assert statistics.win_rate([1, 1, 5, 0], [3, 1, 0, 2]) == 0.375


def test_nan_is_not_a_loss():
    assert math.isnan(statistics.win_rate([math.nan, 1.0], [0.0, 0.0]))
    assert math.isnan(statistics.pair_accuracy([math.nan, 1.0]))
    assert math.isnan(statistics.calibration_error([math.nan, 1.0]))
    assert all(math.isnan(limit) for limit in statistics.win_rate_interval([math.nan, 1.0]))
    assert all(math.isnan(limit) for limit in statistics.bootstrap_interval([math.nan, 1.0], seed=0))


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        statistics.win_rate([1.0, 2.0], [1.0])


def outcomes(wins, losses, ties=0):
    return [1.0] * wins + [0.0] * losses + [0.5] * ties


@pytest.mark.parametrize(
    ("wins", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_interval_without_ties_is_wilsons(wins, total, low, high):
    # Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3.
    interval = statistics.win_rate_interval(outcomes(wins, total - wins))
    assert interval == pytest.approx((low, high), abs=5e-5)


def test_interval_with_ties():
    # All ties: with z^2 = 3.8414588, delta is within +-z^2 / (n + z^2); n = 10: 0.2775328, so 0.5 +- 0.1387664.
    assert statistics.win_rate_interval(outcomes(0, 0, 10)) == pytest.approx((0.3612336, 0.6387664), abs=1e-6)
    # One win, 28 ties: delta's upper limit is Wilson's for 1 of 29, 0.1718, so (1 + 0.1718) / 2.
    assert statistics.win_rate_interval(outcomes(1, 0, 28))[1] == pytest.approx(0.5859, abs=5e-5)


def test_interval_is_symmetric_and_stays_inside():
    low, high = statistics.win_rate_interval(outcomes(30, 10, 10))
    mirrored = statistics.win_rate_interval(outcomes(10, 30, 10))
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)
    assert low < 0.7 < high
    all_wins = statistics.win_rate_interval(outcomes(50, 0))
    assert all_wins[1] == 1.0
    assert all_wins[0] == pytest.approx(1 - 3.8414588 / 53.8414588, abs=1e-6)  # Wilson: n / (n + z^2)
    narrow = statistics.win_rate_interval(outcomes(30, 10, 10), level=0.8)
    assert low < narrow[0] < narrow[1] < high


def test_bootstrap_interval():
    # 0 ... 99: mean 49.5, standard error 28.866 / 10 = 2.887, so about 49.5 +- 1.96 * 2.887 = (43.84, 55.16).
    values = [float(value) for value in range(100)]
    low, high = statistics.bootstrap_interval(values, seed=0)
    assert (low, high) == pytest.approx((43.84, 55.16), abs=0.4)
    assert statistics.bootstrap_interval(values, seed=0) == (low, high)
    assert statistics.bootstrap_interval(values, seed=1) != (low, high)
    # At 50 % the half width is 0.6745 standard errors: 49.5 +- 1.947.
    assert statistics.bootstrap_interval(values, level=0.5, seed=0) == pytest.approx((47.55, 51.45), abs=0.3)
    assert statistics.bootstrap_interval([2.0, 2.0, 2.0], seed=0) == (2.0, 2.0)


def test_quantiles_interpolate():
    # Two resamples only: the sorted means a <= b; 2.5 % of the way from a to b, and 97.5 %.
    low, high = statistics.bootstrap_interval([0.0, 1.0, 4.0, 9.0], num_resamples=2, seed=3)
    a, b = statistics.bootstrap_interval([0.0, 1.0, 4.0, 9.0], level=1.0, num_resamples=2, seed=3)
    assert a < b
    assert (low, high) == pytest.approx((a + 0.025 * (b - a), b - 0.025 * (b - a)), abs=1e-12)


def test_pair_accuracy():
    assert statistics.pair_accuracy([2.0, -1.0, 0.0, 0.5]) == 0.625


def test_calibration_error():
    # sigmoid(ln 3) = 3/4: three of four right is perfect, four of four is 1/4 too modest, one of four 1/2 too sure.
    assert statistics.calibration_error([LN3, LN3, LN3, -LN3]) == pytest.approx(0.0, abs=1e-12)
    assert statistics.calibration_error([LN3, LN3, LN3, LN3]) == pytest.approx(0.25, abs=1e-12)
    assert statistics.calibration_error([LN3, -LN3, -LN3, -LN3]) == pytest.approx(0.5, abs=1e-12)
    # Two bins: at 3/4 one of two right (gap 1/4), at sigmoid(ln 9) = 0.9 one of one (gap 0.1): (2 * 0.25 + 0.1) / 3.
    assert statistics.calibration_error([LN3, -LN3, 2 * LN3]) == pytest.approx(0.2, abs=1e-12)
    # In one bin they partly cancel: |2 right - (0.75 + 0.75 + 0.9)| / 3 = 0.4 / 3.
    assert statistics.calibration_error([LN3, -LN3, 2 * LN3], num_bins=1) == pytest.approx(0.4 / 3, abs=1e-12)
    # Margin 0 says one half and is half right; an infinite one is certain, and here wrong.
    assert statistics.calibration_error([0.0]) == 0.0
    assert statistics.calibration_error([-math.inf]) == 1.0


def test_reliability_bins():
    # Confidences 3/4 (two of three right) and sigmoid(ln 9) = 0.9 (one of one): bins 5 (0.75-0.8) and 8 (0.9-0.95).
    first, second = statistics.reliability_bins([LN3, LN3, -LN3, 2 * LN3 + 1e-9])
    assert (first.low, first.high) == pytest.approx((0.75, 0.8))
    assert (first.num_pairs, first.confidence, first.accuracy) == (3, pytest.approx(0.75), pytest.approx(2 / 3))
    assert (second.low, second.high, second.num_pairs) == (pytest.approx(0.9), pytest.approx(0.95), 1)
    assert (second.confidence, second.accuracy) == (pytest.approx(0.9), 1.0)
    # The last bin holds certainty, the first one a tie, which is half right.
    tie, sure = statistics.reliability_bins([0.0, math.inf], num_bins=2)
    assert (tie.low, tie.accuracy, sure.high, sure.confidence) == (0.5, 0.5, 1.0, 1.0)


def test_calibration_interval_takes_the_excess_of_noise_off():
    # Perfectly calibrated at confidence 3/4: 48 pairs, 36 right, so the estimate is 0. Resamples stray from it by
    # |k - 36| / 48, k ~ Binomial(48, 3/4), deviation 3: they are never below 0, so mirrored they are never above.
    assert statistics.calibration_interval([LN3] * 36 + [-LN3] * 12, seed=0) == (0.0, 0.0)
    # The same with a second bin, 9 of 10 at 0.9: nearly all resamples err, and the interval still holds the estimate.
    both = [LN3] * 36 + [-LN3] * 12 + [2 * LN3 + 1e-9] * 9 + [-2 * LN3 - 1e-9]
    assert statistics.calibration_interval(both, seed=0) == pytest.approx((0.0, 0.0), abs=1e-9)
    # All right: the error is 1/4 in every resample.
    assert statistics.calibration_interval([LN3] * 20, seed=0) == pytest.approx((0.25, 0.25))
    # A quarter right: error 1/2, deviation of k / 48 is 1/16; 1.96 of them: 0.5 +- 0.1225.
    low, high = statistics.calibration_interval([LN3] * 12 + [-LN3] * 36, num_resamples=4000, seed=0)
    assert (low, high) == pytest.approx((0.3775, 0.6225), abs=0.02)
    # At 50 %: 0.6745 deviations, 0.042.
    low, high = statistics.calibration_interval([LN3] * 12 + [-LN3] * 36, level=0.5, num_resamples=4000, seed=0)
    assert (low, high) == pytest.approx((0.458, 0.542), abs=0.012)
    # Too modest in one bin (18 right at 3/4), too sure in another (5 wrong at 0.9): the gaps, 4.5 each, do not cancel.
    # The error is 9 / 23 = 0.3913, its deviation 0.65 x sqrt(23 x 18/23 x 5/23) / 23 = 0.0559.
    low, high = statistics.calibration_interval([LN3] * 18 + [-2 * LN3 - 1e-9] * 5, num_resamples=4000, seed=0)
    assert (low, high) == pytest.approx((0.282, 0.501), abs=0.02)
    assert all(math.isnan(limit) for limit in statistics.calibration_interval([math.nan], seed=0))


def test_calibration_interval_begins_at_0_where_chance_explains_the_error():
    # 100 pairs at 3/4: the share of right ones has deviation 0.0433, and 97.5 % of the errors are below 2.24 of them,
    # 0.097. An error of 0.08 is nothing, one of 0.12 is something.
    assert statistics.calibration_interval([LN3] * 83 + [-LN3] * 17, seed=0)[0] == 0.0
    assert statistics.calibration_interval([LN3] * 87 + [-LN3] * 13, seed=0)[0] > 0.03
    # At 10 % it is what 55 % of the errors are below, 0.755 deviations or 0.033: 0.02 is nothing, 0.05 is something.
    assert statistics.calibration_interval([LN3] * 77 + [-LN3] * 23, level=0.1, seed=0)[0] == 0.0
    assert statistics.calibration_interval([LN3] * 80 + [-LN3] * 20, level=0.1, seed=0)[0] > 0.02


def test_calibration_interval_mirrors_a_lopsided_distribution():
    # Two pairs at 3/4, both wrong, one at 1 - 1e-9, right: resamples from 0 (all right) to 3/4, estimate 1/2; the
    # number of wrong ones is 0, 1, 2, 3 with chances 1, 6, 12, 8 of 27, the error w/4. Ends of the middle 80 % of
    # resamples: 1/4 and 3/4; mirrored at 1/2 the same. Of the middle 40 %: 1/2 and 3/4, mirrored 1/4 and 1/2.
    margins = [-LN3, -LN3, 25.0]
    assert statistics.calibration_interval(margins, level=0.8, seed=0) == pytest.approx((0.25, 0.75), abs=1e-6)
    assert statistics.calibration_interval(margins, level=0.42, seed=0) == pytest.approx((0.25, 0.5), abs=1e-6)


def test_interval_from_a_standard_error():
    # Error sqrt(0.3 x 0.7 / 100) is that of 100 independent outcomes: Wilson's interval of 30 of 100 (Newcombe's
    # formula: (0.3 + 0.0192 -+ 1.96 sqrt(0.0021 + 0.000096)) / 1.0384 = 0.2189, 0.3958).
    error = math.sqrt(0.3 * 0.7 / 100)
    assert statistics.interval_from_error(0.3, error, 7) == pytest.approx((0.2189, 0.3958), abs=1e-4)
    # Twice the error: 25 outcomes, 7.5 of them wins: (0.37683 -+ 1.95996 sqrt(0.0084 + 0.0015366)) / 1.15366.
    assert statistics.interval_from_error(0.3, 2 * error, 7) == pytest.approx((0.1573, 0.4960), abs=1e-4)
    # Without spread it is that of so many prompts: all of 50, as in the test of all wins above.
    low, high = statistics.interval_from_error(1.0, 0.0, 50)
    assert (low, high) == (pytest.approx(1 - 3.8414588 / 53.8414588, abs=1e-6), 1.0)
    assert statistics.interval_from_error(0.0, 0.1, 50) == pytest.approx((0.0, 1 - low), abs=1e-12)
    narrow = statistics.interval_from_error(0.3, error, 7, level=0.5)
    assert narrow == pytest.approx((0.270, 0.332), abs=2e-3)


def exact_coverage(num_outcomes, win_rate, tie_share):
    """Probability that the 95 % interval holds the true win rate: a sum over all possible counts, not a simulation."""
    win_share, loss_share = win_rate - tie_share / 2, 1 - win_rate - tie_share / 2
    coverage = 0.0
    for wins in range(num_outcomes + 1):
        for losses in range(num_outcomes + 1 - wins):
            ties = num_outcomes - wins - losses
            if ties and not tie_share:
                continue
            log_count = math.lgamma(num_outcomes + 1) - sum(math.lgamma(k + 1) for k in (wins, losses, ties))
            log_probability = wins * math.log(win_share) + losses * math.log(loss_share)
            log_probability += ties * math.log(tie_share) if ties else 0.0
            probability = math.exp(log_count + log_probability)
            if probability > 1e-6:
                low, high = statistics.win_rate_interval(outcomes(wins, losses, ties))
                coverage += probability * (low <= win_rate <= high)
    return coverage


@pytest.mark.parametrize("num_outcomes", [50, 200])
@pytest.mark.parametrize(
    ("win_rate", "tie_share"), [(0.5, 0.0), (0.5, 0.3), (0.8, 0.0), (0.8, 0.2), (0.95, 0.0), (0.95, 0.05)]
)
def test_interval_covers_the_truth(num_outcomes, win_rate, tie_share):
    assert 0.93 <= exact_coverage(num_outcomes, win_rate, tie_share) <= 0.97
