"""From answers and logs to the numbers of the alignment study: win rates, intervals, curves. No torch.

Every comparison is within a seed: two systems of a seed share its data and, where they can, its start, and all answer
the same prompts. Values are [k, n], seeds by prompts; intervals are over both (docs/decisions/0020).
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from hydra_rlhf.evaluation.statistics import interval_from_error

ROUNDING = 1e-9
FALLEN = 0.9
"""Share of its peak below which gold has fallen."""
# fmt: off
STUDENT_T = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228,
    12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980, 1000: 1.962,
}
# fmt: on
"""97.5 % points of Student's t by degrees of freedom."""
LARGEST_POINT = 8.0
"""Beyond it a level is 1 to a float, and a win rate's interval is nearly [0, 1] anyway."""


def student(freedom: float) -> float:
    """The 97.5 % point for at most these degrees of freedom: the next lower entry of the table, so never too small."""
    return STUDENT_T[max(known for known in STUDENT_T if known <= max(freedom, 1))]


def spread(values: np.ndarray) -> tuple[float, float]:
    """(standard error, degrees of freedom) of the mean of [k, n] values, both seeds and prompts being drawn.

    The variance between seeds over k plus that between prompts over n; what belongs to neither is in both, which errs
    on the wide side. Degrees of freedom by Satterthwaite (1946): few where the seeds make the error.
    """
    k, n = values.shape
    prompts = float(values.mean(0).var(ddof=1)) / n if n > 1 else 0.0
    seeds = float(values.mean(1).var(ddof=1)) / k if k > 1 else 0.0
    total = prompts + seeds
    if math.sqrt(total) < ROUNDING:
        return 0.0, float(n)
    return math.sqrt(total), total**2 / (prompts**2 / max(n - 1, 1) + seeds**2 / max(k - 1, 1))


def outcomes(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """1 where ours is higher, 0.5 at a tie, 0 where it is lower."""
    return 0.5 * (1 + np.sign(ours - theirs))


def rate(won: np.ndarray) -> dict[str, Any]:
    """Win rate of [k, n] outcomes with its interval, Wilson's at Student's point, and of each seed alone."""
    error, freedom = spread(won)
    level = math.erf(min(student(freedom), LARGEST_POINT) / math.sqrt(2))
    interval = interval_from_error(float(won.mean()), error, won.shape[1], level=level)
    return {"mean": float(won.mean()), "ci": list(interval), "per_seed": won.mean(1).tolist()}


def average(values: np.ndarray) -> dict[str, Any]:
    """Mean of [k, n] values with its interval."""
    mean, (error, freedom) = float(values.mean()), spread(values)
    half = student(freedom) * error
    return {"mean": mean, "ci": [mean - half, mean + half]}


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean of one number a seed with Student's interval; None for it where there is a single seed."""
    mean, k = float(np.mean(values)), len(values)
    half = None if k < 2 else student(k - 1) * float(np.std(values, ddof=1)) / math.sqrt(k)
    interval = None if half is None else [mean - half, mean + half]
    return {"mean": mean, "ci": interval, "per_seed": list(values)}


def describe_methods(
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    costs: Mapping[str, Sequence[Mapping[str, float]]],
    starts: Mapping[str, str | None],
    seeds: Sequence[int],
) -> dict[str, dict[str, Any]]:
    """The block `methods` of the result: every player against its own start, KL, gold, costs; by seed besides."""
    golds = gold_of(answers)
    found: dict[str, dict[str, Any]] = {}
    for name, start in starts.items():
        against = None if start is None else rate(outcomes(golds[name], golds[start]))
        gold, cost = average(golds[name]), costs.get(name, [])
        found[name] = {
            "start": start,
            "gold_win_rate_vs_start": None if against is None else against["mean"],
            "ci": None if against is None else against["ci"],
            "kl": float(np.mean([seen["kl"] for seen in answers[name]])),
            "gold_mean": gold["mean"],
            "gold_mean_ci": gold["ci"],
            "seconds": float(np.mean([one["seconds"] for one in cost])) if cost else None,
            "peak_bytes": max((one["peak_bytes"] for one in cost), default=None),
            "seeds": list(seeds),
            "per_seed": {
                "gold_win_rate_vs_start": None if against is None else against["per_seed"],
                "kl": [seen["kl"] for seen in answers[name]],
                "gold_mean": golds[name].mean(1).tolist(),
                "seconds": [one["seconds"] for one in cost],
                "peak_bytes": [one["peak_bytes"] for one in cost],
                "eos_frac": [seen["eos_frac"] for seen in answers[name]],
                "response_tokens": [float(np.mean(seen["num_tokens"])) for seen in answers[name]],
                "answer_seconds": [seen["seconds"] for seen in answers[name]],
            },
        }
    return found


def gold_of(answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, np.ndarray]:
    """[k, n] gold scores of every player."""
    return {name: np.array([seen["gold"] for seen in by_seed], dtype=float) for name, by_seed in answers.items()}


def head_to_head(golds: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """`A/B`: win rate of A against B by gold, ties half, and the difference of their mean gold scores."""
    found: dict[str, dict[str, Any]] = {}
    for ours in golds:
        for theirs in golds:
            if ours == theirs:
                continue
            won = rate(outcomes(golds[ours], golds[theirs]))
            difference = average(golds[ours] - golds[theirs])
            found[f"{ours}/{theirs}"] = {
                **won,
                "significant": not won["ci"][0] <= 0.5 <= won["ci"][1],
                "gold_difference": difference["mean"],
                "gold_difference_ci": difference["ci"],
            }
    return found


def round_robin(golds: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Mean win rate of each player against all others, the shape of the paper's Table 3; all of them average 0.5."""
    names, num = list(golds), len(golds)
    won: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for one, other in combinations(names, 2):
        result = outcomes(golds[one], golds[other])
        won[one].append(result)
        won[other].append(1 - result)
    return {name: rate(np.sum(won[name], axis=0) / (num - 1)) for name in names}


def equal_seconds(
    ours: Sequence[Sequence[Mapping[str, float]]], theirs: Sequence[Sequence[Mapping[str, float]]]
) -> dict[str, Any]:
    """Held-out gold of two systems, a curve for each seed, after as many seconds of training as the shorter one took.

    Between two looks the curve is taken as straight.
    """
    seconds: list[float] = []
    golds: list[tuple[float, float]] = []
    for mine, other in zip(ours, theirs, strict=True):
        at = min(mine[-1]["seconds"], other[-1]["seconds"])
        seconds.append(at)
        golds.append((gold_at(mine, at), gold_at(other, at)))
    differences = [one - other for one, other in golds]
    return {
        "seconds": float(np.mean(seconds)),
        "gold": [float(np.mean(column)) for column in zip(*golds, strict=True)],
        "difference": over_seeds(differences),
    }


def gold_at(points: Sequence[Mapping[str, float]], seconds: float) -> float:
    """Gold of a curve at a time."""
    times, golds = ([point[name] for point in points] for name in ("seconds", "gold"))
    return float(np.interp(seconds, times, golds))


def over_optimisation(points: Sequence[Mapping[str, float]]) -> dict[str, float | bool | None]:
    """What one curve says: where gold peaked, what it and the learned score did from there to the end.

    A single look is noisy, so the end is the mean of the last tenth of the looks. `fall_step` is the first step after
    which gold stays below `FALLEN` of its peak; over-optimised is a run that has one and whose learned score has risen.
    """
    peak = max(points, key=lambda point: point["gold"])
    last = points[-math.ceil(len(points) / 10) :]
    gold_end, score_end = (float(np.mean([point[name] for point in last])) for name in ("gold", "score"))
    standing = [point["step"] for point in points if point["gold"] >= FALLEN * peak["gold"]]
    fallen = [point["step"] for point in points if point["step"] > standing[-1]]
    return {
        "peak_step": peak["step"],
        "fall_step": fallen[0] if fallen else None,
        "gold_start": points[0]["gold"],
        "gold_peak": peak["gold"],
        "gold_end": gold_end,
        "score_start": points[0]["score"],
        "score_at_peak": peak["score"],
        "score_end": score_end,
        "kl_end": points[-1]["kl"],
        "over_optimised": bool(fallen) and score_end > peak["score"],
    }
