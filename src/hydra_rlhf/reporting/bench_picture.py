"""The picture of `hydra-rlhf bench`: seconds per sample by phase, and memory, planned beside measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra_rlhf.reporting.bench_table import MEASURED, titled_rows
from hydra_rlhf.reporting.svg import BLUE, GREEN, GRID, INK, MUTED, ORANGE, PURPLE, SKY, STYLE
from hydra_rlhf.reporting.tables import byte_unit, format_number

PHASES = {"generate_s": ("generate", BLUE), "score_s": ("score", GREEN), "update_s": ("update", ORANGE)}
"""Parts of a bar of seconds: {part: (its name, its colour)}; what is left of the step is drawn as `rest`."""
REST = ("rest", MUTED)
WIDTH, ROW_HEIGHT, FRAME_HEIGHT = 11.0, 0.42, 1.75
"""In inches, of the whole picture, of a method and of what surrounds one comparison's methods."""


def save_picture(found: Mapping[str, Any], path: Path) -> None:
    """Draw every comparison that was made, one below the other, as SVG or PNG by the file's ending."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = titled_rows(found)
    heights = [FRAME_HEIGHT + ROW_HEIGHT * len(rows) for _, rows in made]
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(made), 2, squeeze=False, height_ratios=heights)
        for (title, rows), (seconds, memory) in zip(made, grid, strict=True):
            draw_seconds(seconds, rows)
            draw_memory(memory, rows)
            seconds.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=32)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw_seconds(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Stacked bars of seconds per sample; a row that was not measured has words instead of a bar."""
    name_rows(axes, rows)
    longest = max((row["time"]["s_per_sample"] for row in rows if row["status"] == MEASURED), default=1.0)
    for y, row in enumerate(rows):
        if row["status"] != MEASURED:
            axes.text(0.01 * longest, y, f"{row['status']}, no time", va="center", style="italic", color=MUTED)
            continue
        left = 0.0
        for name, color, width in parts_of(row["time"]):
            axes.barh(y, width, left=left, color=color, height=0.66, linewidth=0, label=name if y == 0 else None)
            left += width
        axes.text(left + 0.01 * longest, y, f"{format_number(left)} s", va="center", fontsize=11)
    axes.set_xlim(0, 1.22 * longest)
    axes.set_xlabel("seconds per sample")
    legend_of(axes, [(name, {"facecolor": color, "linewidth": 0}) for name, color in (*PHASES.values(), REST)])


def parts_of(time: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """(name, colour, seconds per sample) of each part of a step; they add up to the whole step."""
    parts = [(name, color, time[key]) for key, (name, color) in PHASES.items()]
    rest = max(0.0, time["s_per_sample"] - sum(width for _, _, width in parts))
    return [*parts, (*REST, rest)]


def draw_memory(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Two bars a row: planned, hatched where that is all there is, and measured."""
    unit, size = byte_unit(max(max(row["planned_bytes"], row["measured_bytes"] or 0) for row in rows))
    name_rows(axes, rows)
    axes.set_yticklabels([])
    for y, row in enumerate(rows):
        planned = row["planned_bytes"] / size
        is_measured = row["measured_bytes"] is not None
        style: dict[str, Any] = {"color": SKY, "linewidth": 0}
        if row["status"] != MEASURED:
            style = {"facecolor": "none", "edgecolor": MUTED, "hatch": "////", "linewidth": 0.8}
        axes.barh(y - 0.18 if is_measured else y, planned, height=0.32, **style)
        text = format_number(planned)
        if is_measured:
            measured = row["measured_bytes"] / size
            axes.barh(y + 0.18, measured, height=0.32, color=PURPLE, linewidth=0)
            text += f" / {format_number(measured)}"
        axes.text(1.01 * max(planned, (row["measured_bytes"] or 0) / size), y, f" {text}", va="center", fontsize=11)
    axes.set_xlim(0, 1.28 * axes.dataLim.x1)
    axes.set_xlabel(f"{unit} of tensors at the worst moment")
    entries: list[tuple[str, dict[str, Any]]] = [
        ("planned", {"facecolor": SKY, "linewidth": 0}),
        ("measured", {"facecolor": PURPLE, "linewidth": 0}),
    ]
    if any(row["status"] != MEASURED for row in rows):
        entries.append(("planned, not measured", {"facecolor": "none", "edgecolor": MUTED, "hatch": "////"}))
    legend_of(axes, entries)


def name_rows(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Method and batch at the left of each row, from top to bottom."""
    axes.set_yticks(range(len(rows)), [f"{row['method']} · {row['batch']}" for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.grid(visible=True, axis="x", color=GRID)
    axes.spines["bottom"].set_visible(False)


def legend_of(axes: Any, entries: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Names of the colours above the bars."""
    from matplotlib.patches import Patch

    handles = [Patch(label=name, **style) for name, style in entries]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(handles), fontsize=10)
