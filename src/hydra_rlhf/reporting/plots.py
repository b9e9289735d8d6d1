"""The report's pictures: which metrics are drawn together, in which units, and what to look for."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from hydra_rlhf.reporting.record import RunRecord, Series
from hydra_rlhf.reporting.svg import BLUE, GREEN, MUTED, ORANGE, draw_svg
from hydra_rlhf.reporting.tables import format_number
from hydra_rlhf.reporting.training_findings import MEAN, source_names

MAX_POINTS = 500
"""A longer series is drawn as means of equal groups of steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One picture with its words."""

    key: str
    """Unique in the page; prefixes the ids inside the SVG."""
    title: str
    caption: str
    """What to look for."""
    svg: str
    """Inline SVG; every text in it is escaped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """A chart of metrics over steps."""

    title: str
    unit: str
    """Label of the y axis."""
    lines: tuple[tuple[str, str], ...]
    """(metric, its name in the legend); evaluation metrics are drawn with markers."""
    caption: str
    level: float | None = None
    """A value to compare with, drawn dashed."""
    floor: float | None = None
    """Values below are cut off, so that a wild start does not flatten the rest."""


STAGE1 = (
    Lines(
        title="Losses",
        unit="nats per token, nats per pair",
        lines=(("loss/sft", "response tokens"), ("loss/reward", "pairs")),
        caption="Cross entropy of response tokens, and ranking loss of pairs (guessing: 0.69 nats).",
    ),
    Lines(
        title="Perplexity, held out",
        unit="perplexity",
        lines=(("eval/perplexity", "held out"),),
        caption="Rising again means too many epochs.",
    ),
    Lines(
        title="Pair accuracy",
        unit="share of pairs ranked right",
        lines=(("train/pair_accuracy", "training"), ("eval/pair_accuracy", "held out")),
        caption="Guessing gives 0.5 (dashed). A wide gap between the two means overfitting.",
        level=0.5,
    ),
)
PPO = (
    Lines(
        title="Score",
        unit="score, no unit",
        lines=(("score/mean", "rollouts"), ("eval/score", "held out")),
        caption="What the actor is trained for; only differences mean anything.",
    ),
    Lines(
        title="Gold score, held out",
        unit="gold score, no unit",
        lines=(("eval/gold", "held out"),),
        caption="Never seen in training. Falling while the score rises: over-optimisation.",
    ),
    Lines(
        title="KL from the reference",
        unit="nats per response",
        lines=(("kl/reference", "rollouts"), ("eval/kl", "held out")),
        caption="The price of the score. Healthy runs stay below 20.",
    ),
    Lines(
        title="Policy loss",
        unit="loss, no unit",
        lines=(("loss/policy", "actor"),),
        caption="Near zero by construction; spikes matter, the level does not.",
        level=0.0,
    ),
    Lines(
        title="Value loss",
        unit="half squared error",
        lines=(("loss/value", "critic"),),
        caption="Falls while the critic learns to predict returns.",
    ),
    Lines(
        title="Explained variance",
        unit="share of the returns' variance",
        lines=(("ppo/explained_variance", "critic"),),
        caption="1 is perfect, 0 (dashed) is a constant guess; cut off below −1.",
        level=0.0,
        floor=-1.0,
    ),
    Lines(
        title="Held back by the clip",
        unit="share of tokens",
        lines=(("ppo/clip_frac", "policy"), ("ppo/value_clip_frac", "value")),
        caption="Up to 0.3 for the policy is usual.",
    ),
    Lines(
        title="Entropy",
        unit="nats per token",
        lines=(("ppo/entropy", "actor"),),
        caption="Falls slowly; a collapse makes all responses alike.",
    ),
    Lines(
        title="Response length",
        unit="tokens",
        lines=(("response/tokens_mean", "rollouts"), ("eval/response_tokens", "held out")),
        caption="A drift often means that length is what the reward pays for.",
    ),
    Lines(
        title="Responses that end by themselves",
        unit="share of responses",
        lines=(("response/eos_frac", "rollouts"), ("eval/eos_frac", "held out")),
        caption="The others are cut at the length limit.",
    ),
)
SECOND = ("loss/reward", "ppo/value_clip_frac", "train/rejected_logprob")
"""Training metrics that share a chart with another one."""
PHASES = (
    ("time/rollout_s", "rollout", BLUE),
    ("time/score_s", "score", ORANGE),
    ("time/update_s", "update", GREEN),
)


def stage1_charts(record: RunRecord, stage: str) -> list[Chart]:
    """Losses and held-out numbers of one supervised stage."""
    return [chart for spec in STAGE1 if (chart := line_chart(record, stage, spec, "optimizer step")) is not None]


def ppo_charts(record: RunRecord) -> list[Chart]:
    """Score, gold, KL and the diagnostics of PPO, then its seconds per phase."""
    charts = [line_chart(record, "ppo", spec, "PPO step") for spec in (*PPO, *source_lines(record))]
    return [chart for chart in (*charts, time_chart(record)) if chart is not None]


def source_lines(record: RunRecord) -> list[Lines]:
    """A chart for each source of the reward, where there are several."""
    names = source_names(record)
    return [
        Lines(
            title=f"Source “{name}”",
            unit="as the source",
            lines=((MEAN.replace("NAME", name), "mean"),),
            caption="Its own scores in the rollouts, before normalisation and weight.",
        )
        for name in (names if len(names) > 1 else [])
    ]


def time_chart(record: RunRecord) -> Chart | None:
    """Seconds of each phase, stacked over the PPO steps; None where they were not logged."""
    found = [(name, color, series) for key, name, color in PHASES if (series := record.series("ppo", key))]
    if not found:
        return None
    steps = thin(found[0][2])[0]
    heights = [dict(zip(*thin(series), strict=True)) for _, _, series in found]

    def draw(axes: Any) -> None:
        stacked = [[height.get(step, 0.0) for step in steps] for height in heights]
        if len(steps) == 1:  # an area needs two points
            for index, (name, color, _) in enumerate(found):
                below = sum(column[0] for column in stacked[:index])
                axes.bar(steps, stacked[index], bottom=below, color=color, label=name, width=0.4)
        else:
            colors = [color for _, color, _ in found]
            axes.stackplot(steps, stacked, labels=[name for name, _, _ in found], colors=colors, linewidth=0)
        label_axes(axes, "PPO step", "seconds", steps=set(steps))
        axes.set_ylim(bottom=0)

    caption = "Stacked: sampling, all roles on the responses, learning."
    return Chart(key="ppo-time", title="Seconds per step", caption=caption, svg=draw_svg(draw, "ppo-time", caption))


def thin(series: Series) -> tuple[list[int], list[float]]:
    """Steps and values with at most `MAX_POINTS` points."""
    return group_means(series, MAX_POINTS)


def group_means(series: Series, max_points: int) -> tuple[list[int], list[float]]:
    """Steps and values with at most so many points, each the mean of a group; NaN where a value is not finite."""
    values = [value if math.isfinite(value) else math.nan for value in series.values]
    size = math.ceil(len(values) / max_points)
    groups = [slice(start, start + size) for start in range(0, len(values), size)]
    return [series.steps[group][-1] for group in groups], [sum(values[group]) / len(values[group]) for group in groups]


def line_chart(record: RunRecord, stage: str, spec: Lines, step_name: str) -> Chart | None:
    """The metrics of one chart over the steps of a stage; None where none of them was logged."""
    found = [(key, name, series) for key, name in spec.lines if (series := record.series(stage, key)) is not None]
    if not found:
        return None

    def draw(axes: Any) -> None:
        if spec.level is not None:
            axes.axhline(spec.level, color=MUTED, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
        for key, name, series in found:
            is_sparse = key.startswith("eval/") or len(series.steps) < 3
            color = ORANGE if key.startswith("eval/") else GREEN if key in SECOND else BLUE
            axes.plot(*thin(series), label=name, color=color, marker="o" if is_sparse else None)
        label_axes(axes, step_name, spec.unit, steps=set().union(*(series.steps for _, _, series in found)))
        if spec.floor is not None and axes.get_ylim()[0] < spec.floor:
            axes.set_ylim(bottom=spec.floor, top=max(axes.get_ylim()[1], spec.floor + 1))

    key = f"{stage}-{spec.lines[0][0]}".replace("/", "-").replace("_", "-")
    words = "; ".join(f"{name}: {_from_to(series)}" for _, name, series in found)
    return Chart(
        key=key, title=spec.title, caption=spec.caption, svg=draw_svg(draw, key, f"{spec.title}, {spec.unit}. {words}")
    )


def _from_to(series: Series) -> str:
    (first, start), (last, end) = series.finite()[0], series.finite()[-1]
    return f"{format_number(start)} at step {first}, {format_number(end)} at step {last}"


def label_axes(axes: Any, x: str, y: str, *, steps: Collection[int] = (), counts: bool = False) -> None:
    """Names of the axes, few ticks at round numbers, a legend above where there is more than one line."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if y:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=counts))
    if len(steps) == 1:
        axes.set_xticks(list(steps))
        axes.margins(x=1)
    elif steps:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    handles, _ = axes.get_legend_handles_labels()
    if len(handles) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(handles))
