"""Round robins: totals of a tournament, Bradley-Terry strengths, and bootstrap weights over prompts and seeds (numpy).

An entry is one set of answers to all prompts; the entries of one player are its runs with several seeds. `outcomes[i,
j, k]` is 1, 0.5 or 0 as entry i's answer to prompt k wins, ties or loses against entry j's, and NaN where the two were
not compared or the judgement failed. Shapes: e entries, p players, n prompts, w sets of weights.
"""

import numpy as np
from jaxtyping import Float, Int

PRIOR = 0.5
"""Wins that every player has over every other before any comparison (one tie): strengths stay finite where one wins
all. With two players and no ties it is Jeffreys' prior."""
MAX_STEP = 1.0
"""Longest Newton step of a strength; from far off a full step can overshoot."""


def seed_weights(
    generator: np.random.Generator, player_of: Int[np.ndarray, " e"], num: int
) -> Float[np.ndarray, "w e"]:
    """`num` sets of weights over each player's entries, adding up to their number k.

    Dirichlet((k - 2) / k) draws, under which a weighted mean varies by s^2 / k, s^2 the unbiased variance between
    entries: equal weights for one entry, one of the two at random for two. (A plain bootstrap gives (k - 1) / k of it.)
    """
    weights = np.ones((num, len(player_of)))
    for player in range(int(player_of.max()) + 1):
        (members,) = np.nonzero(player_of == player)
        k = len(members)
        if k == 2:
            weights[:, members] = 2 * np.eye(2)[generator.integers(0, 2, num)]
        elif k > 2:
            weights[:, members] = k * generator.dirichlet(np.full(k, (k - 2) / k), num)
    return weights


def pair_totals(
    outcomes: Float[np.ndarray, "e e n"],
    player_of: Int[np.ndarray, " e"],
    prompt_weights: Float[np.ndarray, "w n"],
    entry_weights: Float[np.ndarray, "w e"],
) -> tuple[Float[np.ndarray, "w p p"], Float[np.ndarray, "w p p"]]:
    """(wins, comparisons) of each player against each other one, per pair of entries; ties count half a win.

    A pair of players with several entries each counts as one comparison a prompt, the mean over pairs of entries.
    """
    num_entries, num_players = len(player_of), int(player_of.max()) + 1
    known = ~np.isnan(outcomes)
    membership = np.zeros((num_players, num_entries))
    membership[player_of, np.arange(num_entries)] = 1 / np.bincount(player_of)[player_of]
    pair_weights = entry_weights[:, :, None] * entry_weights[:, None, :]

    def total(values: Float[np.ndarray, "e e n"]) -> Float[np.ndarray, "w p p"]:
        per_entry = np.moveaxis(values @ prompt_weights.T, -1, 0) * pair_weights
        return membership @ per_entry @ membership.T

    return total(np.where(known, outcomes, 0.0)), total(known.astype(float))


def fit_strengths(wins: Float[np.ndarray, "*w p p"]) -> Float[np.ndarray, "*w p"]:
    """Bradley-Terry strengths theta (log-odds, mean 0): P(i beats j) = sigmoid(theta_i - theta_j).

    Newton's method on the log-likelihood sum_ij wins[i, j] log sigmoid(theta_i - theta_j); ties are half wins on both
    sides. Every player must have won against every other, if only the little that `PRIOR` gives; the diagonal does not
    count.
    """
    games = wins + np.swapaxes(wins, -1, -2)
    theta = np.zeros_like(wins[..., 0])
    for _ in range(200):
        expected = 1 / (1 + np.exp(theta[..., None, :] - theta[..., :, None]))
        gradient = (wins - games * expected).sum(-1)
        spread = games * expected * (1 - expected)
        # The Laplacian of `spread`; its one flat direction, a shift of all strengths, is filled up.
        hessian = np.eye(theta.shape[-1]) * spread.sum(-1)[..., None] - spread + spread.mean((-1, -2), keepdims=True)
        step = np.clip(np.linalg.solve(hessian, gradient[..., None])[..., 0], -MAX_STEP, MAX_STEP)
        theta = theta + step - (theta + step).mean(-1, keepdims=True)
        if np.abs(step).max() < 1e-9:
            break
    return theta


def strengths_of(wins: Float[np.ndarray, "p p"]) -> Float[np.ndarray, " p"]:
    """Strengths with the prior's tie between every two players."""
    return fit_strengths(wins + PRIOR)


def bootstrap(
    outcomes: Float[np.ndarray, "e e n"], player_of: Int[np.ndarray, " e"], *, num_resamples: int = 1000, seed: int
) -> tuple[Float[np.ndarray, "w p p"], Float[np.ndarray, "w p"]]:
    """(win rates, strengths) under `num_resamples` random weightings of prompts and seeds (Rubin's Bayesian bootstrap).

    A prompt keeps one weight in all its comparisons, so answers to one prompt need not be independent. The prior's half
    wins are weighted like prompts, by Gamma(1/2): so an interval has a width where one player has won everything.
    """
    generator = np.random.default_rng(seed)
    num_players = int(player_of.max()) + 1
    prompt_weights = generator.standard_exponential((num_resamples, outcomes.shape[-1]))
    wins, games = pair_totals(outcomes, player_of, prompt_weights, seed_weights(generator, player_of, num_resamples))
    prior = np.maximum(generator.standard_gamma(PRIOR, (num_resamples, num_players, num_players)), 1e-6)
    with np.errstate(invalid="ignore"):
        rates = wins / games
    return rates, fit_strengths(wins + prior)


def percentiles(values: Float[np.ndarray, "w *x"], *, level: float = 0.95) -> Float[np.ndarray, "2 *x"]:  # noqa: F821
    """(low, high) ends of the middle `level` of each column."""
    return np.quantile(values, ((1 - level) / 2, (1 + level) / 2), axis=0)
