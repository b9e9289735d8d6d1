"""Mistakes in `evaluation/bradley_terry.py`: {function: [(what went wrong, source, source with the mistake)]}."""

ONE_HOT = "2 * np.eye(2)[generator.integers(0, 2, num)]"
DIRICHLET = "generator.dirichlet(np.full(k, (k - 2) / k), num)"
EXPECTED = "1 / (1 + np.exp(theta[..., None, :] - theta[..., :, None]))"
GRADIENT = "(wins - games * expected).sum(-1)"

CHANGES = {
    "seed_weights": [
        ("plain Dirichlet", DIRICHLET, "generator.dirichlet(np.ones(k), num)"),
        ("not scaled to k", "weights[:, members] = k * generator", "weights[:, members] = generator"),
        ("two seeds always alike", ONE_HOT, "1.0"),
        ("two seeds not scaled", ONE_HOT, ONE_HOT.replace("2 * ", "", 1)),
        ("no weights for more", "elif k > 2:", "elif k > 99:"),
        ("bootstrap of seeds", DIRICHLET, "generator.multinomial(k, np.full(k, 1 / k), num) / k"),
    ],
    "pair_totals": [
        ("prompt weights ignored", "values @ prompt_weights.T", "values @ np.ones_like(prompt_weights).T"),
        ("entry weights ignored", " * pair_weights\n", "\n"),
        ("entries added up", "1 / np.bincount(player_of)[player_of]", "1.0"),
        ("failures are losses", "total(known.astype(float))", "total(np.ones_like(outcomes))"),
        ("failures are ties", "np.where(known, outcomes, 0.0)", "np.where(known, outcomes, 0.5)"),
        (
            "weights of one side",
            "entry_weights[:, :, None] * entry_weights[:, None, :]",
            "entry_weights[:, :, None] * np.ones_like(entry_weights)[:, None, :]",
        ),
    ],
    "fit_strengths": [
        ("sign", EXPECTED, "1 / (1 + np.exp(theta[..., :, None] - theta[..., None, :]))"),
        ("one step only", "for _ in range(200):\n        expected", "for _ in range(1):\n        expected"),
        ("games of one side", "games = wins + np.swapaxes(wins, -1, -2)", "games = 2 * wins"),
        ("win rates for strengths", "return theta\n", "return 1 / (1 + np.exp(-theta))\n"),
        ("stops early", "np.abs(step).max() < 1e-9", "np.abs(step).max() < 0.3"),
        ("gradient halved in games", GRADIENT, "(wins - games * expected / 2).sum(-1)"),
    ],
    "strengths_of": [
        ("no prior", "return fit_strengths(wins + PRIOR)", "return fit_strengths(wins + 1e-9)"),
        ("a whole win each", "return fit_strengths(wins + PRIOR)", "return fit_strengths(wins + 1.0)"),
        ("prior as a factor", "return fit_strengths(wins + PRIOR)", "return fit_strengths(wins * PRIOR + 1e-9)"),
        ("sign", "return fit_strengths(wins + PRIOR)", "return -fit_strengths(wins + PRIOR)"),
        ("turned round", "return fit_strengths(wins + PRIOR)", "return fit_strengths(wins.T + PRIOR)"),
    ],
    "bootstrap": [
        (
            "prior not weighted",
            "np.maximum(generator.standard_gamma(PRIOR, (num_resamples, num_players, num_players)), 1e-6)",
            "PRIOR",
        ),
        ("prior a whole win", "generator.standard_gamma(PRIOR, (num", "generator.standard_gamma(1.0, (num"),
        (
            "prompts not weighted",
            "generator.standard_exponential((num_resamples, outcomes.shape[-1]))",
            "np.ones((num_resamples, outcomes.shape[-1]))",
        ),
        (
            "weights too even",
            "generator.standard_exponential((num_resamples, outcomes.shape[-1]))",
            "generator.standard_gamma(2.0, (num_resamples, outcomes.shape[-1]))",
        ),
        (
            "seed ignored",
            "generator = np.random.default_rng(seed)\n    num_players",
            "generator = np.random.default_rng(0)\n    num_players",
        ),
        ("no prior", "fit_strengths(wins + prior)", "fit_strengths(wins + 1e-9)"),
        ("rates of the losers", "rates = wins / games", "rates = 1 - wins / games"),
    ],
    "percentiles": [
        ("level ignored", "((1 - level) / 2, (1 + level) / 2)", "(0.025, 0.975)"),
        ("one-sided", "((1 - level) / 2, (1 + level) / 2)", "(1 - level, level)"),
        ("ends swapped", "((1 - level) / 2, (1 + level) / 2)", "((1 + level) / 2, (1 - level) / 2)"),
        ("upper half", "((1 - level) / 2, (1 + level) / 2)", "(0.5, (1 + level) / 2)"),
        ("whole range", "((1 - level) / 2, (1 + level) / 2)", "(0.0, 1.0)"),
    ],
}
