"""The picture of the alignment study: gold against KL as training goes on, and over-optimisation with and without KL.

    python benchmarks/alignment_picture.py benchmarks/results/alignment_study.json

Writes an SVG beside the result file. `alignment_study.py` does it by itself.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra_rlhf.reporting.svg import BLUE, GREEN, MUTED, OCHRE, ORANGE, PURPLE, SKY, STYLE

COLOURS = {
    "hydra-ppo": BLUE,
    "j-hydra-ppo": SKY,
    "lora-ppo": ORANGE,
    "ppo": OCHRE,
    "rloo": GREEN,
    "grpo": PURPLE,
}
"""The systems whose training is drawn; `d-lora-ppo` is lora-ppo's mathematics and would lie under it."""


def mean_curve(by_seed: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, list[float]]:
    """Look by look, the mean over seeds of every number."""
    looks = list(zip(*by_seed, strict=True))
    return {name: [sum(point[name] for point in look) / len(look) for look in looks] for name in looks[0][0]}


def save_picture(result: Mapping[str, Any], path: Path) -> None:
    """Draw what the result holds: a panel of gold against KL, and one for each run of the over-optimised pair."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    methods, runs = result.get("methods", {}), result.get("overoptimisation", {}).get("runs", {})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(15, 4.6), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        first, *rest = figure.subplots(1, 1 + len(runs), squeeze=False)[0]
        for name, colour in COLOURS.items():
            if methods.get(name, {}).get("curves"):
                seen = mean_curve(methods[name]["curves"])
                first.plot(seen["kl"], seen["gold"], color=colour, marker="o", label=name)
        title(first, "Gold against KL, held-out prompts")
        first.set_xlabel("KL from the start, nats per response")
        first.set_ylabel("gold")
        if first.lines:
            first.legend()
        for axes, (label, run) in zip(rest, runs.items(), strict=True):
            draw_pair(axes, label, mean_curve(run["curves"]))
        figure.savefig(path, metadata={"Date": None})


def draw_pair(axes: Any, label: str, seen: Mapping[str, Sequence[float]]) -> None:
    """Gold and the learned score over the steps of one run; each has its own unit, so its own axis."""
    axes.plot(seen["step"], seen["gold"], color=BLUE, label="gold (left)")
    axes.set_ylim(0, 10)
    axes.set_xlabel("PPO step")
    scores = axes.twinx()
    scores.plot(seen["step"], seen["score"], color=ORANGE, linestyle="--", label="learned score (right)")
    scores.grid(visible=False)
    scores.tick_params(colors=MUTED)
    title(axes, f"A weak reward model, {label}")
    lines = [*axes.get_lines(), *scores.get_lines()]
    axes.legend(lines, [line.get_label() for line in lines], loc="lower left")


def title(axes: Any, text: str) -> None:
    """A panel's title."""
    axes.set_title(text, loc="left", fontsize=12, fontweight="bold")


def main() -> None:
    """Draw a result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path)
    args = parser.parse_args()
    save_picture(json.loads(args.result.read_text(encoding="utf-8")), args.result.with_suffix(".svg"))


if __name__ == "__main__":
    main()
