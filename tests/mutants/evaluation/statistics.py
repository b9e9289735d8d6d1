"""Mistakes in `evaluation/statistics.py`: {function: [(what went wrong, source, source with the mistake)]}."""

OUTCOME = "0.5 * (1 + (a > b) - (a < b))"
WIDER = "observed - delta > z * math.sqrt(variance)"
MIRRORED = "2 * estimate - _quantile(errors, fraction)"
CENTRE = "centre = (rate + z * z / (2 * n)) / (1 + z * z / n)"
RADIUS = "math.sqrt(rate * (1 - rate) / n + (z / (2 * n)) ** 2)"
GAP = "sum(b.num_pairs * abs(b.accuracy - b.confidence) for b in bins) / len(margins)"

CHANGES = {
    "pair_outcomes and win_rate": [
        ("ties are losses", OUTCOME, "1.0 * (a > b)"),
        ("ties are wins", OUTCOME, "1.0 * (a >= b)"),
        ("sides swapped", OUTCOME, "0.5 * (1 + (b > a) - (b < a))"),
        ("NaN is a loss", "math.nan if math.isnan(a) or math.isnan(b) else ", ""),
        ("lengths may differ", "list(zip(ours, theirs, strict=True))", "list(zip(ours, theirs))"),
    ],
    "win_rate_interval": [
        ("one-sided", "z = NormalDist().inv_cdf(0.5 + level / 2)\n    low", "z = NormalDist().inv_cdf(level)\n    low"),
        ("not halved", "return (1 + low) / 2, (1 + high) / 2", "return 1 + low, 1 + high"),
        (
            "sides not swapped",
            "-_lower_delta(losses, wins, len(outcomes), z)",
            "-_lower_delta(wins, losses, len(outcomes), z)",
        ),
        (
            "ties dropped",
            "high = -_lower_delta(losses, wins, len(outcomes), z)",
            "high = -_lower_delta(losses, wins, max(1, wins + losses), z)",
        ),
        (
            "variance without the losses",
            "max(2 * loss_rate + delta * (1 - delta), 0.0)",
            "max(delta * (1 - delta), 0.0)",
        ),
        ("variance of the difference alone", "delta * (1 - delta), 0.0) / n", "delta * (1 + delta), 0.0) / n"),
        ("z forgotten", WIDER, WIDER.replace("z * ", "")),
        (
            "smaller root",
            "(math.sqrt(max(b * b - 4 * a * c, 0.0)) - b)",
            "(-math.sqrt(max(b * b - 4 * a * c, 0.0)) - b)",
        ),
    ],
    "reliability_bins": [
        ("low end of the next bin", "low=0.5 + index / (2 * num_bins)", "low=0.5 + (index + 1) / (2 * num_bins)"),
        ("high end of its own low end", "high=0.5 + (index + 1) / (2 * num_bins)", "high=0.5 + index / (2 * num_bins)"),
        ("bins over all of 0 to 1", "int((confidence - 0.5) * 2 * num_bins)", "int(confidence * num_bins)"),
        ("empty bins kept out wrongly", "        if pairs\n", "        if len(pairs) > 1\n"),
        ("confidence of the sign", "math.exp(-abs(margin))", "math.exp(-margin)"),
        (
            "accuracy and confidence mixed up",
            "accuracy=fmean(right for _, right in pairs)",
            "accuracy=fmean(right for right, _ in pairs)",
        ),
    ],
    "calibration_error": [
        ("bins weighted alike", GAP, "fmean(abs(b.accuracy - b.confidence) for b in bins)"),
        ("signs cancel", GAP, GAP.replace("abs(b.accuracy - b.confidence)", "(b.accuracy - b.confidence)")),
        ("largest gap", GAP, "max(abs(b.accuracy - b.confidence) for b in bins)"),
        ("squared", GAP, GAP.replace("abs(b.accuracy - b.confidence)", "(b.accuracy - b.confidence) ** 2")),
        ("always ten bins", "bins = reliability_bins(margins, num_bins=num_bins)", "bins = reliability_bins(margins)"),
    ],
    "calibration_interval": [
        ("not mirrored", MIRRORED, "_quantile(errors, 1 - fraction)"),
        ("ends below the estimate", "max(high, estimate)", "high"),
        ("level ignored", "((1 + level) / 2, (1 - level) / 2))", "(0.975, 0.025))"),
        ("one-sided", "((1 + level) / 2, (1 - level) / 2))", "(level, 1 - level))"),
        (
            "signs cancel",
            "np.abs(generator.multinomial(len(margins), shares) @ gaps).sum()",
            "abs((generator.multinomial(len(margins), shares) @ gaps).sum())",
        ),
        (
            "chance is no excuse",
            "    if estimate <= _quantile(errors_if",
            "    if False and estimate <= _quantile(errors_if",
        ),
        (
            "chance always is",
            "    if estimate <= _quantile(errors_if",
            "    if True or estimate <= _quantile(errors_if",
        ),
        ("pairs not resampled", "generator.multinomial(len(margins), shares) @ gaps", "np.ones(len(margins)) @ gaps"),
    ],
    "interval_from_error": [
        ("Wald's centre", CENTRE, "centre = rate"),
        (
            "number of prompts always",
            "n = rate * (1 - rate) / standard_error**2 if standard_error > 0 else float(num_prompts)",
            "n = float(num_prompts)",
        ),
        ("error not squared", "/ standard_error**2", "/ standard_error"),
        ("no Wilson term", RADIUS, "math.sqrt(rate * (1 - rate) / n)"),
        ("radius not shrunk", "half = z / (1 + z * z / n) *", "half = z *"),
        ("all losses divide by zero made one", "n = n if n > 0 else float(num_prompts)", "n = n if n > 0 else 1.0"),
        (
            "one-sided",
            "z = NormalDist().inv_cdf(0.5 + level / 2)\n    centre",
            "z = NormalDist().inv_cdf(level)\n    centre",
        ),
    ],
}
