"""Strengths, totals and bootstrap weights against hand-worked numbers and known strengths."""

import numpy as np
import pytest

from hydra_rlhf.evaluation import bradley_terry

NAN = float("nan")
LN3 = 1.0986122886681098


def round_robin(strengths, num_prompts, seed):
    """Outcomes of a tournament without ties between players of known strengths, one entry each."""
    rng = np.random.default_rng(seed)
    p = len(strengths)
    outcomes = np.full((p, p, num_prompts), NAN)
    for i in range(p):
        for j in range(i):
            chance = 1 / (1 + np.exp(strengths[j] - strengths[i]))
            outcomes[i, j] = rng.random(num_prompts) < chance
            outcomes[j, i] = 1 - outcomes[i, j]
    return outcomes


def totals(outcomes, player_of):
    e, n = len(player_of), outcomes.shape[-1]
    wins, games = bradley_terry.pair_totals(outcomes, np.array(player_of), np.ones((1, n)), np.ones((1, e)))
    return wins[0], games[0]


def test_two_players_have_the_log_odds_of_their_wins():
    # 3 wins to 1: the odds are 3, so the strengths are +-ln(3) / 2.
    assert bradley_terry.fit_strengths(np.array([[0.0, 3.0], [1.0, 0.0]])) == pytest.approx([LN3 / 2, -LN3 / 2])


def test_a_consistent_table_is_met_exactly():
    # Odds 3 and 2 in a row, 6 across: strengths ln 3 and ln 2 apart, whatever the numbers of games (4, 30, 7).
    wins = np.array([[0.0, 3.0, 6.0], [1.0, 0.0, 20.0], [1.0, 10.0, 0.0]])
    theta = bradley_terry.fit_strengths(wins)
    assert theta[0] - theta[1] == pytest.approx(LN3)
    assert theta[1] - theta[2] == pytest.approx(np.log(2))
    assert theta.sum() == pytest.approx(0.0, abs=1e-12)


def test_what_lies_on_the_diagonal_is_no_game():
    assert bradley_terry.fit_strengths(np.array([[9.0, 3.0], [1.0, 7.0]])) == pytest.approx([LN3 / 2, -LN3 / 2])


def test_far_apart_strengths_are_found():
    # From 0 a full Newton step for odds of 1e6 is far too long or too short; ln(1e6) / 2 = 6.907755.
    theta = bradley_terry.fit_strengths(np.array([[0.0, 1e6], [1.0, 0.0]]))
    assert theta == pytest.approx([6.907755, -6.907755], abs=1e-6)


def test_strengths_stay_finite_for_one_who_wins_all():
    # 4 wins to 0 with half a win for each: odds 9, ln(9) / 2.
    assert bradley_terry.strengths_of(np.array([[0.0, 4.0], [0.0, 0.0]])) == pytest.approx([LN3, -LN3])


def test_several_tables_at_once():
    tables = np.array([[[0.0, 3.0], [1.0, 0.0]], [[0.0, 1.0], [3.0, 0.0]]])
    assert bradley_terry.fit_strengths(tables) == pytest.approx(np.array([[LN3 / 2, -LN3 / 2], [-LN3 / 2, LN3 / 2]]))


@pytest.mark.parametrize("seed", [0, 1])
def test_known_strengths_are_recovered(seed):
    # 20,000 prompts: standard errors below 0.02.
    known = np.array([0.0, 0.5, -1.0, 1.5])
    wins, _ = totals(round_robin(known, 20_000, seed), [0, 1, 2, 3])
    assert bradley_terry.strengths_of(wins) == pytest.approx(known - known.mean(), abs=0.07)


def test_totals_leave_out_what_was_not_judged():
    # Entry 0 against 1: win, tie, not judged. 1.5 of 2.
    outcomes = np.full((2, 2, 3), NAN)
    outcomes[0, 1] = [1.0, 0.5, NAN]
    outcomes[1, 0] = [0.0, 0.5, NAN]
    wins, games = totals(outcomes, [0, 1])
    assert wins.tolist() == [[0.0, 1.5], [0.5, 0.0]]
    assert games.tolist() == [[0.0, 2.0], [2.0, 0.0]]


def seeded():
    """Player 0 is entry 0, player 1 is entries 1 and 2; entry 0 beats 1 on both prompts and 2 on none."""
    outcomes = np.full((3, 3, 2), NAN)
    outcomes[0, 1], outcomes[1, 0] = 1.0, 0.0
    outcomes[0, 2], outcomes[2, 0] = 0.0, 1.0
    return outcomes, np.array([0, 1, 1])


def test_entries_of_one_player_are_averaged():
    wins, games = totals(*seeded())
    assert wins.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert games.tolist() == [[0.0, 2.0], [2.0, 0.0]]


def test_totals_follow_the_weights_of_prompts_and_of_entries():
    outcomes, player_of = seeded()
    outcomes[0, 1, 1], outcomes[1, 0, 1] = 0.0, 1.0
    # Prompt weights 3 and 5. All weight on entry 1: (3 x 1 + 5 x 0) x 2 / 2 = 3 wins of 8. On entry 2: none of 8.
    weights = np.array([[3.0, 5.0], [3.0, 5.0]])
    wins, games = bradley_terry.pair_totals(outcomes, player_of, weights, np.array([[1.0, 2.0, 0.0], [1.0, 0.0, 2.0]]))
    assert wins[:, 0, 1].tolist() == [3.0, 0.0]
    assert wins[:, 1, 0].tolist() == [5.0, 8.0]
    assert games[:, 0, 1].tolist() == [8.0, 8.0]


def test_seed_weights_carry_the_variance_between_seeds():
    # A weighted mean of k values varies by s^2 / k, s^2 with divisor k - 1: of (0, 1) by 1/4; of (0, 1, 5) by 7 / 3,
    # since s^2 = (4 + 1 + 9) / 2 = 7. A single entry has weight 1.
    weights = bradley_terry.seed_weights(np.random.default_rng(0), np.array([0, 1, 1, 2, 2, 2]), 40_000)
    assert (weights[:, 0] == 1.0).all()
    assert weights[:, 1:3].sum(1) == pytest.approx(np.full(40_000, 2.0))
    assert weights[:, 3:].sum(1) == pytest.approx(np.full(40_000, 3.0))
    assert weights.mean(0) == pytest.approx(np.ones(6), abs=0.03)
    assert (weights[:, 1:3] @ [0.0, 1.0] / 2).var() == pytest.approx(0.25, rel=0.03)
    assert (weights[:, 3:] @ [0.0, 1.0, 5.0] / 3).var() == pytest.approx(7 / 3, rel=0.05)


def test_bootstrap_gives_the_posterior_of_wins():
    # 12 wins and 8 losses with Jeffreys' prior: Beta(12.5, 8.5), mean 0.5952, deviation sqrt(p q / 22) = 0.1046. The
    # rates themselves leave the prior out: mean 0.6, deviation sqrt(0.6 x 0.4 / 21) = 0.1069.
    outcomes = np.full((2, 2, 20), NAN)
    outcomes[0, 1] = [1.0] * 12 + [0.0] * 8
    outcomes[1, 0] = 1 - outcomes[0, 1]
    rates, strengths = bradley_terry.bootstrap(outcomes, np.array([0, 1]), num_resamples=20_000, seed=0)
    chance = 1 / (1 + np.exp(strengths[:, 1] - strengths[:, 0]))
    assert chance.mean() == pytest.approx(0.5952, abs=0.004)
    assert chance.std() == pytest.approx(0.1046, rel=0.03)
    assert rates[:, 0, 1].mean() == pytest.approx(0.6, abs=0.004)
    assert rates[:, 0, 1].std() == pytest.approx(0.1069, rel=0.03)
    again = [
        bradley_terry.bootstrap(outcomes, np.array([0, 1]), num_resamples=50, seed=seed)[0][:, 0, 1].tolist()
        for seed in (3, 3, 4)
    ]
    assert again[0] == again[1] != again[2]


def test_bootstrap_keeps_a_width_where_one_wins_all():
    # 50 wins of 50, Beta(50.5, 0.5): the middle 95 % of the chance is 0.9516 to 0.99999.
    outcomes = np.full((2, 2, 50), NAN)
    outcomes[0, 1], outcomes[1, 0] = 1.0, 0.0
    _, strengths = bradley_terry.bootstrap(outcomes, np.array([0, 1]), num_resamples=4000, seed=0)
    low, high = bradley_terry.percentiles(1 / (1 + np.exp(strengths[:, 1] - strengths[:, 0])))
    assert low == pytest.approx(0.9516, abs=0.006)
    assert high > 0.999


def test_a_prompt_has_one_weight_in_all_its_comparisons():
    # Entries 1 and 2 answer alike, so that entry 0 does equally well against both under every weighting.
    outcomes = np.full((3, 3, 8), NAN)
    row = np.array([1.0, 0.0, 0.5, 1.0, 1.0, 0.0, 1.0, 0.5])
    outcomes[0, 1] = outcomes[0, 2] = row
    outcomes[1, 0] = outcomes[2, 0] = 1 - row
    outcomes[1, 2] = outcomes[2, 1] = 0.5
    rates, _ = bradley_terry.bootstrap(outcomes, np.array([0, 1, 2]), num_resamples=20, seed=0)
    assert rates[:, 0, 1] == pytest.approx(rates[:, 0, 2])
    assert rates[:, 0, 1].std() > 0.05


def test_intervals_of_strengths_cover_the_truth():
    # 120 studies of 60 prompts at three strengths: 95 % +- 2 % (standard error); 0.89 is three of them below.
    known = np.array([0.0, 0.7, -1.2])
    hits = np.zeros(2)
    for study in range(120):
        _, strengths = bradley_terry.bootstrap(
            round_robin(known, 60, (9, study)), np.arange(3), num_resamples=250, seed=study
        )
        low, high = bradley_terry.percentiles(strengths - strengths[:, :1])
        hits += ((low <= known) & (known <= high))[1:]
    assert (hits / 120 > 0.89).all()
    assert (hits / 120 < 0.995).all()


def test_percentiles():
    # Of 0 ... 100: 2.5 and 97.5 at 95 %, 25 and 75 at 50 %.
    values = np.arange(101.0)[:, None]
    assert bradley_terry.percentiles(values).ravel().tolist() == pytest.approx([2.5, 97.5])
    assert bradley_terry.percentiles(values, level=0.5).ravel().tolist() == pytest.approx([25.0, 75.0])
