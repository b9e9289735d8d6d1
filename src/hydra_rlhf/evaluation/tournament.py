"""A round robin: one judge compares every player's answers with every other's, and what that comes to."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from hydra_rlhf.errors import JudgeError
from hydra_rlhf.evaluation import bradley_terry
from hydra_rlhf.evaluation.answers import Answers, Questions
from hydra_rlhf.evaluation.judges import Judge, ScoreJudge
from hydra_rlhf.evaluation.length_control import length_controlled_win_rate
from hydra_rlhf.evaluation.llm_judge import Match
from hydra_rlhf.evaluation.statistics import interval_from_error, pair_outcomes, win_rate_interval


def hold_tournament(judge: Judge, questions: Questions, entries: Sequence[Answers], *, seed: int) -> dict[str, Any]:
    """What one judge says of all entries: win rates between players with intervals, length-controlled ones, strengths.

    `win_rates[i][j]` is player i against player j, None on the diagonal. Raises `JudgeError` where two players share no
    comparison that was judged.
    """
    players = list(dict.fromkeys(entry.player for entry in entries))
    player_of = np.array([players.index(entry.player) for entry in entries])
    outcomes, notes = compare_all(judge, questions, entries, player_of)
    num_prompts = outcomes.shape[-1]
    ones = np.ones((1, num_prompts)), np.ones((1, len(entries)))
    wins, games = (total[0] for total in bradley_terry.pair_totals(outcomes, player_of, *ones))
    for i, j in combinations(range(len(players)), 2):
        if games[i, j] == 0:
            raise JudgeError(f"{judge.name}: no comparison of {players[i]} with {players[j]} could be judged")
    rates, strengths = bradley_terry.bootstrap(outcomes, player_of, seed=seed)
    matrix: list[list[Any]] = [[None] * len(players) for _ in players]
    controlled: list[list[Any]] = [[None] * len(players) for _ in players]
    for i, j in combinations(range(len(players)), 2):
        cell = win_rate_cell(outcomes[np.ix_(player_of == i, player_of == j)], rates[:, i, j])
        matrix[i][j], matrix[j][i] = cell, mirrored(cell)
        cell = controlled_cell(outcomes, entries, player_of, i, j, seed=seed)
        controlled[i][j], controlled[j][i] = cell, mirrored(cell)
    return {
        "judge": judge.name,
        "win_rates": matrix,
        "length_controlled_win_rates": controlled,
        "strengths": strength_rows(bradley_terry.strengths_of(wins), strengths),
        **notes,
    }


def compare_all(
    judge: Judge, questions: Questions, entries: Sequence[Answers], player_of: np.ndarray
) -> tuple[np.ndarray, dict[str, Any]]:
    """(outcomes [e, e, n], notes): every entry against every other player's, as `bradley_terry` reads it."""
    num_prompts = len(questions.prompts)
    outcomes = np.full((len(entries), len(entries), num_prompts), math.nan)
    pairs = [(a, b) for a, b in combinations(range(len(entries)), 2) if player_of[a] != player_of[b]]
    if isinstance(judge, ScoreJudge):
        scores = judge.score(questions, entries)
        found = [outcome for a, b in pairs for outcome in pair_outcomes(scores[a], scores[b])]
        notes: dict[str, Any] = {"mean_scores": mean_scores(scores, entries)}
    else:
        texts = questions.texts
        matches = [
            Match(prompt=texts[k], ours=entries[a].texts[k], theirs=entries[b].texts[k])
            for a, b in pairs
            for k in range(num_prompts)
        ]
        found, tally = judge.llm.outcomes(matches)
        notes = {"asked": asdict(tally)}
    for number, (a, b) in enumerate(pairs):
        outcomes[a, b] = found[number * num_prompts : (number + 1) * num_prompts]
        outcomes[b, a] = 1 - outcomes[a, b]
    return outcomes, notes


def mean_scores(scores: Sequence[Sequence[float]], entries: Sequence[Answers]) -> dict[str, float]:
    """Mean score of each player over its entries and all prompts."""
    found: dict[str, list[float]] = {}
    for entry, values in zip(entries, scores, strict=True):
        found.setdefault(entry.player, []).extend(values)
    return {player: sum(values) / len(values) for player, values in found.items()}


def win_rate_cell(outcomes: np.ndarray, resampled: np.ndarray) -> dict[str, Any]:
    """Rate and interval of one player against another, from their entries' outcomes [a, b, n].

    One entry each: the score interval of paired outcomes. Several: Wilson's with the standard error that resampled
    prompts and seeds give.
    """
    known = outcomes[~np.isnan(outcomes)]
    rate = float(known.mean())
    if outcomes.shape[:2] == (1, 1):
        interval = win_rate_interval(known.tolist())
    else:
        num_prompts = int((~np.isnan(outcomes)).any(axis=(0, 1)).sum())
        interval = interval_from_error(rate, float(np.nanstd(resampled)), num_prompts)
    return {
        "rate": rate,
        "ci": list(interval),
        "wins": int((known == 1.0).sum()),
        "ties": int((known == 0.5).sum()),
        "losses": int((known == 0.0).sum()),
        "failed": int(outcomes.size - known.size),
    }


def controlled_cell(
    outcomes: np.ndarray, entries: Sequence[Answers], player_of: np.ndarray, i: int, j: int, *, seed: int
) -> dict[str, Any]:
    """Length-controlled rate and interval of player i against player j; lengths are characters, which every tokenizer
    counts alike."""
    rows: list[tuple[float, int, int, int, int, int]] = []
    for run_a, a in enumerate(np.flatnonzero(player_of == i).tolist()):
        for run_b, b in enumerate(np.flatnonzero(player_of == j).tolist()):
            for k, outcome in enumerate(outcomes[a, b]):
                if not math.isnan(outcome):
                    rows.append((outcome, len(entries[a].texts[k]), len(entries[b].texts[k]), k, run_a, run_b))
    won, ours, theirs, *numbers = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    prompts, runs_a, runs_b = (column.astype(int) for column in numbers)
    rate, interval = length_controlled_win_rate(won, ours, theirs, prompts, runs=(runs_a, runs_b), seed=seed)
    return {"rate": rate, "ci": list(interval)}


def mirrored(cell: dict[str, Any]) -> dict[str, Any]:
    """The same comparison from the other side."""
    other = cell | {"rate": 1 - cell["rate"], "ci": [1 - cell["ci"][1], 1 - cell["ci"][0]]}
    return other | ({"wins": cell["losses"], "losses": cell["wins"]} if "wins" in cell else {})


def strength_rows(strengths: np.ndarray, resampled: np.ndarray) -> list[dict[str, Any]]:
    """Strength of every player over the first one, in log-odds, with its interval; the first one's own is 0."""
    low, high = bradley_terry.percentiles(resampled - resampled[:, :1])
    return [
        {"strength": float(strength - strengths[0]), "ci": [float(low[p]), float(high[p])]}
        for p, strength in enumerate(strengths)
    ]
