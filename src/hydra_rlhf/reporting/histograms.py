"""Histograms of scores before and after training."""

import math
from collections.abc import Sequence
from typing import Any

from hydra_rlhf.reporting.plots import Chart, label_axes
from hydra_rlhf.reporting.record import RunRecord
from hydra_rlhf.reporting.svg import BLUE, MUTED, draw_svg
from hydra_rlhf.reporting.tables import format_number


def score_histograms(record: RunRecord) -> list[Chart]:
    """Score (and gold) of reference and actor in the final comparison; before it, of early and late rollouts."""
    samples = [sample for sample in record.samples if sample.kind == "evaluation"]
    scores = [(s.reference_score, s.score) for s in samples if s.reference_score is not None and s.score is not None]
    golds = [(s.reference_gold, s.gold) for s in samples if s.reference_gold is not None and s.gold is not None]
    sides = ("reference", "actor")
    found = [
        _histogram([p[0] for p in pairs], [p[1] for p in pairs], sides, key=key, title=title, unit=unit)
        for pairs, key, title, unit in (
            (scores, "histogram-score", "Score before and after", "score, no unit"),
            (golds, "histogram-gold", "Gold score before and after", "gold score, no unit"),
        )
        if pairs
    ]
    return found or _rollout_histogram(record)


def _rollout_histogram(record: RunRecord) -> list[Chart]:
    rollouts = [(s.step, s.score) for s in record.samples if s.kind == "rollout" and s.score is not None]
    steps = sorted({step for step, _ in rollouts})
    quarter = len(steps) // 4
    if quarter == 0:
        return []
    early = [score for step, score in rollouts if step <= steps[quarter - 1]]
    late = [score for step, score in rollouts if step >= steps[-quarter]]
    sides = ("first quarter", "last quarter")
    return [_histogram(early, late, sides, key="histogram-score", title="Score, kept rollouts", unit="score, no unit")]


def _histogram(
    before: Sequence[float], after: Sequence[float], sides: tuple[str, str], *, key: str, title: str, unit: str
) -> Chart:
    means = (sum(before) / len(before), sum(after) / len(after))
    low, high = min(*before, *after), max(*before, *after)
    num_bins = max(8, min(24, round(math.sqrt(len(before)) * 2)))
    edges = [low + (high - low or 1.0) * i / num_bins for i in range(num_bins + 1)]

    def draw(axes: Any) -> None:
        for values, mean, name, color in zip((before, after), means, sides, (MUTED, BLUE), strict=True):
            axes.hist(values, bins=edges, color=color, alpha=0.28, linewidth=0)
            axes.hist(values, bins=edges, color=color, histtype="step", linewidth=1.6, label=name)
            axes.axvline(mean, color=color, linestyle=(0, (4, 3)), linewidth=1.4)
        label_axes(axes, unit, "responses", counts=True)

    described = ", ".join(f"{name} {format_number(mean)}" for name, mean in zip(sides, means, strict=True))
    count = f"{len(after)} prompts" if len(before) == len(after) else f"{len(before)} and {len(after)} responses"
    words = f"Means (dashed): {described}; {count}."
    return Chart(key=key, title=title, caption=words, svg=draw_svg(draw, key, words))
