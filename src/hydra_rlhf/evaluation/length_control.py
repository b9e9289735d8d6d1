"""Win rates with the effect of length taken out (numpy)."""

import numpy as np
from jaxtyping import Float

from hydra_rlhf.evaluation.bradley_terry import PRIOR, percentiles, seed_weights

SLOPE_DEVIATION = 2.5
"""Standard deviation of the slope's normal prior, wide enough to matter only where length decides everything."""


def length_term(lengths: Float[np.ndarray, " n"], other_lengths: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """tanh of the length difference over its standard deviation; 0 everywhere where all differences are 0.

    The deviation is around 0 and not around the mean, so that equal lengths stay at 0 whatever the usual difference is.
    """
    difference = lengths - other_lengths
    deviation = np.sqrt(np.mean(difference**2))
    return np.tanh(difference / deviation) if deviation > 0 else np.zeros_like(difference)


def fit_length_model(
    outcomes: Float[np.ndarray, " n"],
    terms: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, "w n"],
    prior: Float[np.ndarray, "w 2"],
) -> Float[np.ndarray, "w 2"]:
    """(a, b) of P(win) = sigmoid(a + b x length term), one row per set of weights, by Newton's method.

    Ties are half wins. `prior` holds the weights of a win and of a loss at equal lengths.
    """
    y, x = np.append(outcomes, [1.0, 0.0]), np.append(terms, [0.0, 0.0])
    weights = np.concatenate([weights, prior], axis=1)
    features = np.stack([np.ones_like(x), x], axis=1)
    penalty = np.array([0.0, SLOPE_DEVIATION**-2])
    coefficients = np.zeros((len(weights), 2))
    for _ in range(200):
        expected = 1 / (1 + np.exp(-coefficients @ features.T))
        gradient = (weights * (y - expected)) @ features - penalty * coefficients
        curvature = np.einsum("wn,ni,nj->wij", weights * expected * (1 - expected), features, features)
        step = np.linalg.solve(curvature + np.diag(penalty), gradient[..., None])[..., 0]
        coefficients += np.clip(step, -1.0, 1.0)
        if np.abs(step).max() < 1e-9:
            break
    return coefficients


def length_controlled_win_rate(
    outcomes: Float[np.ndarray, " n"],
    lengths: Float[np.ndarray, " n"],
    other_lengths: Float[np.ndarray, " n"],
    prompts: np.ndarray,
    *,
    runs: tuple[np.ndarray, np.ndarray] | None = None,
    num_resamples: int = 1000,
    seed: int,
) -> tuple[float, tuple[float, float]]:
    """(rate, (low, high)): the win rate that a logistic model predicts where both answers are equally long.

    The idea of AlpacaEval 2 (Dubois et al. 2024): P(win) = sigmoid(a + b tanh(d / s)), d the difference in length and s
    its root mean square; the controlled rate is sigmoid(a). `prompts` numbers each outcome's prompt: outcomes of one
    prompt are weighted together in the bootstrap. Where a side has several runs (seeds), `runs` numbers each outcome's
    run on both sides, from 0: runs are weighted too, and a prompt counts once, as the mean over pairs of runs.
    """
    generator = np.random.default_rng(seed)
    terms = length_term(lengths, other_lengths)
    _, cluster = np.unique(prompts, return_inverse=True)
    drawn = generator.standard_exponential((num_resamples, int(cluster.max()) + 1))[:, cluster]
    even = np.ones((1, len(outcomes)))
    for side in runs or ():
        entries = np.zeros(int(side.max()) + 1, dtype=int)
        drawn = drawn * seed_weights(generator, entries, num_resamples)[:, side] / len(entries)
        even = even / len(entries)
    point = fit_length_model(outcomes, terms, even, np.full((1, 2), PRIOR))
    prior = np.maximum(generator.standard_gamma(PRIOR, (num_resamples, 2)), 1e-6)
    low, high = percentiles(1 / (1 + np.exp(-fit_length_model(outcomes, terms, drawn, prior)[:, 0])))
    return float(1 / (1 + np.exp(-point[0, 0]))), (float(low), float(high))
