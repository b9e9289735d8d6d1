"""Mistakes in `evaluation/length_control.py`: {function: [(what went wrong, source, source with the mistake)]}."""

DEVIATION = "np.sqrt(np.mean(difference**2))"
STEP = "gradient = (weights * (y - expected)) @ features - penalty * coefficients"

CHANGES = {
    "length_term": [
        ("around the mean", DEVIATION, "(np.std(difference) or 1.0)"),
        ("not squared", DEVIATION, "np.mean(np.abs(difference))"),
        ("no tanh", "np.tanh(difference / deviation)", "difference / deviation"),
        ("not scaled", "np.tanh(difference / deviation)", "np.tanh(difference)"),
        ("sign", "difference = lengths - other_lengths", "difference = other_lengths - lengths"),
        ("variance for deviation", DEVIATION, "np.mean(difference**2)"),
    ],
    "fit_length_model": [
        ("weights ignored", STEP, STEP.replace("weights * ", "")),
        ("no penalty", "penalty = np.array([0.0, SLOPE_DEVIATION**-2])", "penalty = np.array([0.0, 1e-12])"),
        (
            "penalty on both",
            "penalty = np.array([0.0, SLOPE_DEVIATION**-2])",
            "penalty = np.array([SLOPE_DEVIATION**-2] * 2)",
        ),
        ("deviation for variance", "SLOPE_DEVIATION**-2", "SLOPE_DEVIATION**-1"),
        ("prior of wins only", "np.append(outcomes, [1.0, 0.0])", "np.append(outcomes, [1.0, 1.0])"),
        ("one step only", "for _ in range(200):", "for _ in range(1):"),
        ("no intercept", "np.stack([np.ones_like(x), x], axis=1)", "np.stack([1e-3 * np.ones_like(x), x], axis=1)"),
    ],
    "length_controlled_win_rate": [
        ("rate at the mean length", "np.exp(-point[0, 0])", "np.exp(-point[0, 0] - point[0, 1] * terms.mean())"),
        ("slope for intercept", "np.exp(-point[0, 0])", "np.exp(-point[0, 1])"),
        ("sign", "np.exp(-point[0, 0])", "np.exp(point[0, 0])"),
        ("every outcome its own prompt", "np.unique(prompts, return_inverse=True)", "(None, np.arange(len(prompts)))"),
        ("no prior", "np.full((1, 2), PRIOR)", "np.full((1, 2), 1e-6)"),
        (
            "prompts not resampled",
            "generator.standard_exponential((num_resamples, int(cluster.max()) + 1))[:, cluster]",
            "np.ones((num_resamples, len(cluster)))",
        ),
        ("interval of the slope", "prior)[:, 0]", "prior)[:, 1]"),
        (
            "runs not weighted",
            "drawn = drawn * seed_weights(generator, entries, num_resamples)[:, side]",
            "drawn = drawn",
        ),
        ("every pair of runs counts", "even = even / len(entries)", "even = even"),
        (
            "lengths swapped",
            "terms = length_term(lengths, other_lengths)",
            "terms = 0 * length_term(lengths, other_lengths)",
        ),
    ],
}
