"""The picture of a report's memory section: what each phase of each method holds, planned beside measured."""

from collections.abc import Mapping
from typing import Any

from hydra_rlhf.memory.count import PARTS
from hydra_rlhf.reporting.plots import Chart
from hydra_rlhf.reporting.record import RunRecord
from hydra_rlhf.reporting.svg import BLUE, GREEN, INK, MUTED, OCHRE, ORANGE, PURPLE, SKY, WASH, draw_svg
from hydra_rlhf.reporting.tables import byte_unit, format_number

COLORS: dict[str, str] = dict(zip(PARTS, (BLUE, SKY, GREEN, PURPLE, INK, OCHRE, ORANGE, MUTED), strict=True))
SEEN = 0.002
"""Share of the longest bar from which a part can be seen, and is named in the legend."""
BAR, HEADING, GAP = 1.0, 1.1, 0.5
"""Height of a bar's row, of a method's name and of the space after a method, in rows."""
ROW_PIXELS = 19
LEGEND_COLUMNS = 5


def memory_chart(record: RunRecord) -> Chart | None:
    """Planned bytes of each phase as stacked bars, grouped by method, with this run's measured ones; None without."""
    largest = max((sum(parts.values()) for phases in record.plan.values() for parts in phases.values()), default=0.0)
    if largest <= 0:
        return None
    unit, size = byte_unit(largest)
    measured = {phase: found / size for phase in record.measured if (found := record.measured_bytes(phase)) is not None}
    height = sum(HEADING + BAR * len(phases) + GAP for phases in record.plan.values())
    longest = max(largest / size, *measured.values(), 0.0)

    def draw(axes: Any) -> None:
        top, rows = 0.0, []
        for method, phases in record.plan.items():
            is_own = method == record.method
            bottom = top + HEADING + BAR * len(phases)
            if is_own:
                axes.axhspan(top - 0.15, bottom + 0.15, color=WASH, linewidth=0, zorder=0)
            name = f"{method} · this run" if is_own else method
            axes.text(0, top + HEADING / 2, name, va="center", fontweight="bold")
            for index, (phase, parts) in enumerate(phases.items()):
                rows.append((top + HEADING + BAR * (index + 0.5), phase))
                is_peak = sum(parts.values()) == max(sum(other.values()) for other in phases.values())
                found = measured.get(phase) if is_own else None
                _bar(axes, rows[-1][0], parts, size, unit=unit, is_peak=is_peak, measured=found, longest=longest)
            top = bottom + GAP
        axes.set_yticks([y for y, _ in rows], [phase for _, phase in rows])
        axes.set_ylim(top - GAP + 0.2, -0.2)
        axes.set_xlim(0, 1.3 * longest)
        axes.set_xlabel(f"{unit} of tensors")
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="x", length=0)
        _legend(axes, record, largest, bool(measured))

    caption = (
        "What a phase holds at its worst moment, planned with this run's model, batch and settings. Phases come one "
        "after the other, so a method needs what its largest phase needs (bold)."
    )
    if not measured:
        caption += " With memory.track_tensors=true this run's measured bytes would stand beside them."
    words = f"{caption} {_own_words(record, unit, size)}".strip()
    svg = draw_svg(draw, "memory", words, width=860, height=round(96 + ROW_PIXELS * height))
    return Chart(key="memory", title="What each method needs, phase by phase", caption=caption, svg=svg)


def _bar(
    axes: Any,
    y: float,
    parts: Mapping[str, float],
    size: float,
    *,
    unit: str,
    is_peak: bool,
    measured: float | None,
    longest: float,
) -> None:
    """One phase: its parts end to end, a line where it was measured, and the numbers behind it."""
    left = 0.0
    for part in PARTS:
        width = parts.get(part, 0.0) / size
        axes.barh(y, width, left=left, color=COLORS[part], height=0.68, linewidth=0)
        left += width
    text = f"{format_number(left)} {unit}"
    if measured is not None:
        axes.plot([measured, measured], [y - 0.46, y + 0.46], color=INK, linewidth=2.4, solid_capstyle="butt", zorder=4)
        text += f", measured {format_number(measured)}"
    end = max(left, measured or 0.0) + 0.01 * longest
    axes.text(end, y, text, va="center", fontsize=11, fontweight="bold" if is_peak else "normal")


def _legend(axes: Any, record: RunRecord, largest: float, has_measured: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    bars = [parts for phases in record.plan.values() for parts in phases.values()]
    seen = [part for part in PARTS if max(parts.get(part, 0.0) for parts in bars) >= SEEN * largest]
    handles: list[Any] = [Patch(facecolor=COLORS[part], linewidth=0, label=part) for part in seen]
    if has_measured:
        exact = any("peak_tensor_bytes" in seen for seen in record.measured.values())
        label = "measured, all tensors" if exact else "measured by CUDA's allocator"
        handles.append(
            Line2D([], [], color=INK, linewidth=2.4, marker="|", linestyle="none", markersize=11, label=label)
        )
        handles[-1].set_markeredgewidth(2.4)
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=LEGEND_COLUMNS, borderpad=0.2)


def _own_words(record: RunRecord, unit: str, size: float) -> str:
    """This run's phases in words, for who cannot see the picture."""
    found = []
    for phase, parts in record.plan.get(record.method or "", {}).items():
        measured = record.measured_bytes(phase)
        beside = "" if measured is None else f", measured {format_number(measured / size)}"
        found.append(f"{phase}: {format_number(sum(parts.values()) / size)} {unit}{beside}")
    return "; ".join(found)
