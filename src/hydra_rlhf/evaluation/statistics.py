"""Win rates, accuracies, calibration and how sure one can be of them (no torch).

A win counts 1, a tie 0.5, a loss 0. A NaN among the inputs makes the result NaN: left to comparisons it would pass as
a loss.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

import numpy as np
from jaxtyping import Float, Int


def pair_outcomes(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """1, 0.5 or 0 for each position where ours is higher, equal or lower; NaN where either is NaN."""
    pairs = list(zip(ours, theirs, strict=True))
    return [math.nan if math.isnan(a) or math.isnan(b) else 0.5 * (1 + (a > b) - (a < b)) for a, b in pairs]


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Share of positions where ours is higher, ties half; at least one position."""
    return fmean(pair_outcomes(ours, theirs))


def win_rate_interval(outcomes: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval (low, high) of a win rate, from outcomes 1 (win), 0.5 (tie) and 0 (loss).

    The score interval for the difference of paired proportions (Tango 1998, Statistics in Medicine 17, 891-908): with
    delta = P(win) - P(loss), the win rate is (1 + delta) / 2, and the limits are the deltas that a test with the tie
    share fitted under that delta would just not reject. Without ties it is Wilson's interval. Unlike a bootstrap it
    keeps its width when nearly all outcomes are wins. Chosen by measured coverage: docs/decisions/0013.
    """
    assert len(outcomes) > 0, "no outcomes"
    if any(math.isnan(outcome) for outcome in outcomes):
        return math.nan, math.nan
    assert all(outcome in (0.0, 0.5, 1.0) for outcome in outcomes), "an outcome is 1, 0.5 or 0"
    wins = sum(outcome == 1.0 for outcome in outcomes)
    losses = sum(outcome == 0.0 for outcome in outcomes)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    low = _lower_delta(wins, losses, len(outcomes), z)
    high = -_lower_delta(losses, wins, len(outcomes), z)
    return (1 + low) / 2, (1 + high) / 2


def _lower_delta(wins: int, losses: int, num_outcomes: int, z: float) -> float:
    """Lower limit of delta = P(win) - P(loss): where the observed difference lies z standard errors above delta."""
    n = num_outcomes
    observed = (wins - losses) / n
    low, high = -1.0, observed
    for _ in range(60):  # bisection, to the last bit of a float
        delta = (low + high) / 2
        # P(loss) that fits best when P(win) - P(loss) = delta: the larger root of a x^2 + b x + c.
        a, b, c = 2 * n, -wins - losses + (2 * n - wins + losses) * delta, -losses * delta * (1 - delta)
        loss_rate = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = max(2 * loss_rate + delta * (1 - delta), 0.0) / n
        if observed - delta > z * math.sqrt(variance):
            low = delta
        else:
            high = delta
    return low


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, num_resamples: int = 2000, seed: int
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of the mean (Efron 1979); equal seeds give equal intervals.

    For averages of real-valued scores. Not for win rates: with few losses in the sample it is far too narrow, and
    with none it has no width at all; `win_rate_interval` is for those.
    """
    assert len(values) > 0, "no values"
    if any(math.isnan(value) for value in values):
        return math.nan, math.nan
    generator = random.Random(seed)
    means = sorted(fmean(generator.choices(values, k=len(values))) for _ in range(num_resamples))
    return _quantile(means, (1 - level) / 2), _quantile(means, (1 + level) / 2)


def _quantile(ordered: list[float], fraction: float) -> float:
    """Value at `fraction` of the way through an ordered list, interpolated between neighbours."""
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def pair_accuracy(margins: Sequence[float]) -> float:
    """Share of pairs whose margin (score of chosen - score of rejected) is positive, ties half."""
    return win_rate(margins, [0.0] * len(margins))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReliabilityBin:
    """Pairs whose predictions are about equally confident."""

    low: float
    """Least confidence of the bin."""
    high: float
    """Largest confidence of the bin."""
    num_pairs: int
    confidence: float
    """Mean confidence of its pairs."""
    accuracy: float
    """Share of its pairs predicted right, ties half."""


def confidences(margins: Sequence[float]) -> list[tuple[float, float]]:
    """(confidence, right) of each pair.

    Which side was chosen must not be known to the prediction, so each pair predicts its higher-scored side, with
    confidence sigmoid(|margin|) in [0.5, 1], and is right (1) if that is the chosen one, half right at a tie.
    """
    rights = pair_outcomes(margins, [0.0] * len(margins))
    return [(1 / (1 + math.exp(-abs(margin))), right) for margin, right in zip(margins, rights, strict=True)]


def bin_of(confidence: float, num_bins: int) -> int:
    """Which of `num_bins` equal bins of [0.5, 1] a confidence falls into; 1 belongs to the last."""
    return min(int((confidence - 0.5) * 2 * num_bins), num_bins - 1)


def reliability_bins(margins: Sequence[float], *, num_bins: int = 10) -> list[ReliabilityBin]:
    """The bins that hold pairs, in order of confidence: the points of a reliability diagram."""
    assert not any(math.isnan(margin) for margin in margins), "a NaN has no bin"
    members: list[list[tuple[float, float]]] = [[] for _ in range(num_bins)]
    for confidence, right in confidences(margins):
        members[bin_of(confidence, num_bins)].append((confidence, right))
    return [
        ReliabilityBin(
            low=0.5 + index / (2 * num_bins),
            high=0.5 + (index + 1) / (2 * num_bins),
            num_pairs=len(pairs),
            confidence=fmean(confidence for confidence, _ in pairs),
            accuracy=fmean(right for _, right in pairs),
        )
        for index, pairs in enumerate(members)
        if pairs
    ]


def calibration_error(margins: Sequence[float], *, num_bins: int = 10) -> float:
    """Expected calibration error of sigmoid(margin) as the probability that the chosen response wins.

    The mean over pairs of |accuracy - mean confidence| of their bin (Guo et al. 2017). 0 is perfect; counting each pair
    in both directions gives the same number.
    """
    assert len(margins) > 0, "no margins"
    if any(math.isnan(margin) for margin in margins):
        return math.nan
    bins = reliability_bins(margins, num_bins=num_bins)
    return sum(b.num_pairs * abs(b.accuracy - b.confidence) for b in bins) / len(margins)


def calibration_interval(
    margins: Sequence[float], *, level: float = 0.95, num_bins: int = 10, num_resamples: int = 1000, seed: int
) -> tuple[float, float]:
    """Confidence interval (low, high) of the calibration error, from resampled pairs; equal seeds give equal intervals.

    Noise in the bins makes the error of a sample too large, and that of a resample larger again by about as much. So
    the interval is mirrored (the "basic" bootstrap: 2 x estimate - quantile), which takes that excess off; it always
    holds the estimate. It begins at 0 where a perfectly calibrated model with these confidences would show as large an
    error (Broecker and Smith 2007).
    """
    assert len(margins) > 0, "no margins"
    if any(math.isnan(margin) for margin in margins):
        return math.nan, math.nan
    found = confidences(margins)
    gaps = np.zeros((len(margins), num_bins))
    for row, (confidence, right) in enumerate(found):
        gaps[row, bin_of(confidence, num_bins)] = right - confidence
    generator = np.random.default_rng(seed)
    shares = np.full(len(margins), 1 / len(margins))
    errors = sorted(
        float(np.abs(generator.multinomial(len(margins), shares) @ gaps).sum()) / len(margins)
        for _ in range(num_resamples)
    )
    estimate = calibration_error(margins, num_bins=num_bins)
    ends = (2 * estimate - _quantile(errors, fraction) for fraction in ((1 + level) / 2, (1 - level) / 2))
    low, high = ends
    low, high = max(0.0, min(low, estimate)), max(high, estimate)
    chances = np.array([confidence for confidence, _ in found])
    bins = np.array([bin_of(confidence, num_bins) for confidence, _ in found])
    if estimate <= _quantile(errors_if_calibrated(generator, chances, bins, num_resamples), (1 + level) / 2):
        low = 0.0
    return low, high


def errors_if_calibrated(
    generator: np.random.Generator, chances: Float[np.ndarray, " n"], bins: Int[np.ndarray, " n"], num: int
) -> list[float]:
    """`num` calibration errors in order, of pairs that are right with exactly the chance that was predicted."""
    return sorted(
        float(np.abs(np.bincount(bins, (generator.random(len(chances)) < chances) - chances)).sum()) / len(chances)
        for _ in range(num)
    )


def interval_from_error(
    rate: float, standard_error: float, num_prompts: int, *, level: float = 0.95
) -> tuple[float, float]:
    """Interval (low, high) of a win rate whose standard error is known, e.g. over prompts and seeds.

    Wilson's interval at the number of independent wins and losses that would have this error,
    rate x (1 - rate) / error^2. Where the error is 0 (all wins, all losses) it is that of `num_prompts` outcomes.
    """
    assert num_prompts > 0, "no prompts"
    n = rate * (1 - rate) / standard_error**2 if standard_error > 0 else float(num_prompts)
    n = n if n > 0 else float(num_prompts)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + (z / (2 * n)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)
