"""The numbers of the report with their units: how they are written, the cards at its top, and its tables."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hydra_rlhf.model.roles import TRAINABLE_ROLES
from hydra_rlhf.reporting.record import Interval, RunRecord

NBSP = "\u00a0"
"""Between a number and its unit, so that no line breaks there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One of the few numbers that matter."""

    label: str
    value: str
    unit: str = ""
    detail: str = ""
    """What to hold the number against."""
    interval: Interval | None = None
    """Ends of a confidence interval between 0 and 1, drawn under the number."""
    point: float | None = None
    """The number itself, between 0 and 1, where there is an interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table as text, ready for HTML and for Markdown."""

    title: str
    columns: tuple[str, ...]
    """Heads; the first column names the row."""
    rows: tuple[tuple[str, ...], ...]
    """Cells, as wide as `columns`."""
    numeric: bool = True
    """Whether the columns after the first hold numbers, and are set right-aligned."""
    marked: tuple[int, ...] = ()
    """Indices of the rows that are this run's, or were chosen for it."""


def format_number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, without exponent between 0.001 and 10 million; a dash for None."""
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    size = math.floor(math.log10(abs(value)))
    if not -4 < size < 7:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - size)}f}".replace("-", "−")


def format_score(value: float | None, *, sign: bool = False) -> str:
    """A score with two decimals, so that scores compare at a glance; `sign` also writes a plus. A dash for None."""
    return "–" if value is None else f"{value:{'+' if sign else ''}.2f}".replace("-", "−")


def format_count(value: float | None) -> str:
    """A whole number with thousands separated; a dash for None."""
    return "–" if value is None else f"{value:,.0f}"


def format_share(value: float | None) -> str:
    """A share of one in percent; a dash for None."""
    return "–" if value is None else f"{100 * value:.1f}{NBSP}%"


def format_interval(interval: Interval) -> str:
    """A confidence interval of a share, in percent."""
    return f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f}{NBSP}%"


def byte_unit(largest: float) -> tuple[str, float]:
    """(unit, bytes per unit) that writes `largest` with few digits: KiB, MiB or GiB."""
    for unit, size in (("GiB", 2.0**30), ("MiB", 2.0**20)):
        if largest >= size:
            return unit, size
    return "KiB", 2.0**10


def format_bytes(value: float) -> str:
    """Bytes in the unit that suits them."""
    unit, size = byte_unit(value)
    return f"{format_number(value / size)}{NBSP}{unit}"


def format_seconds(value: float) -> str:
    """Seconds, with minutes and hours where there are some."""
    if value < 60:
        return f"{format_number(value)}{NBSP}s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (seconds, "s")] if hours else [(minutes, "min"), (seconds, "s")]
    return NBSP.join(f"{count}{NBSP}{unit}" for count, unit in parts)


def cards(record: RunRecord) -> list[Card]:
    """The numbers at the top of the report, those that the run has."""
    summary = record.summary
    found: list[Card] = []
    against = "actor against reference, ties half"
    if summary.num_prompts is not None:
        against += f", {format_count(summary.num_prompts)} prompts"
    for label, rate, interval in (
        ("Gold win rate", summary.gold_win_rate, summary.gold_win_rate_ci),
        ("Score win rate", summary.score_win_rate, summary.score_win_rate_ci),
    ):
        if rate is not None:
            detail = f"95{NBSP}%: {format_interval(interval)}; {against}" if interval else against
            found.append(
                Card(label=label, value=_percent(rate), unit="%", detail=detail, interval=interval, point=rate)
            )
    if summary.reward_accuracy is not None:
        beside = [("“longer wins”", summary.longer_wins_accuracy), ("gold itself", summary.gold_accuracy)]
        detail = "held-out pairs; " + "; ".join(
            f"{name} {format_share(rate)}" for name, rate in beside if rate is not None
        )
        found.append(
            Card(label="Reward accuracy", value=_percent(summary.reward_accuracy), unit="%", detail=detail.rstrip("; "))
        )
    if summary.kl is not None:
        found.append(
            Card(label="KL", value=format_number(summary.kl), unit="nats/response", detail="actor from reference")
        )
    if summary.response_tokens_mean is not None:
        before = summary.reference_response_tokens_mean
        value = format_number(summary.response_tokens_mean)
        found.append(
            Card(
                label="Response length",
                value=value if before is None else f"{format_number(before)} → {value}",
                unit="tokens",
                detail="mean" if before is None else "mean of reference → actor",
            )
        )
    reserved = record.series("ppo", "memory/cuda_peak_reserved_bytes")
    for label, count, detail in (
        ("Peak memory", summary.peak_rss_bytes, "resident memory of the process"),
        ("Peak GPU memory", max(v for _, v in reserved.finite()) if reserved else None, "reserved by the allocator"),
    ):
        if count is not None:
            value, _, unit = format_bytes(count).rpartition(NBSP)
            found.append(Card(label=label, value=value, unit=unit, detail=detail))
    if summary.wall_s is not None:
        found.append(Card(label="Wall time", value=format_seconds(summary.wall_s), detail="the whole run"))
    return found


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}"


def roles_table(record: RunRecord) -> Table | None:
    """Role -> trunk, adapter, head and what it trains; None where the method is not known."""
    if not record.roles:
        return None
    rows = []
    for name, role in record.roles.items():
        learns = "nothing"
        if name in TRAINABLE_ROLES:
            learns = "the whole trunk" if role.adapter is None else f"LoRA set “{role.adapter}”"
            learns += "" if role.head == "lm" else f" and the {role.head} head"
            learns += f" ({format_bytes(record.bytes_trained[name])})" if name in record.bytes_trained else ""
        rows.append((name, role.trunk, role.adapter or "none", role.head, learns))
    return Table(title="Roles", columns=("Role", "Trunk", "Adapter", "Head", "Trains"), rows=tuple(rows), numeric=False)


def stages_table(record: RunRecord) -> Table | None:
    """Steps, seconds and speed of each stage that logged anything."""
    rows = []
    for stage, metrics in record.curves.items():
        steps = {step for series in metrics.values() for step in series.steps}
        seconds = record.series(stage, "time/step_s")
        rows.append(
            (
                stage,
                format_count(len(steps)),
                format_seconds(sum(value for _, value in seconds.finite())) if seconds else "–",
                format_seconds(seconds.end() or 0.0) if seconds else "–",
            )
        )
    columns = ("Stage", "Steps logged", "Time in steps", "Time per step, last tenth")
    return Table(title="Stages", columns=columns, rows=tuple(rows)) if rows else None


def data_table(record: RunRecord) -> Table | None:
    """What was read, dropped and cut, one column a split."""
    if not record.splits:
        return None
    reasons = dict.fromkeys(reason for split in record.splits for reason in split.dropped)
    cuts = dict.fromkeys(name for split in record.splits for name in split.cut)
    lines: list[tuple[str, list[str]]] = [
        ("Source", [split.source or "–" for split in record.splits]),
        ("Format", [split.format or "–" for split in record.splits]),
        ("Rows read", [format_count(split.rows_read) for split in record.splits]),
        *(
            (f"Dropped: {_plain(reason)}", [format_count(s.dropped.get(reason)) for s in record.splits])
            for reason in reasons
        ),
        ("Rows used", [format_count(split.rows_used) for split in record.splits]),
        *((f"Rows with {_plain(name)}", [format_count(s.cut.get(name)) for s in record.splits]) for name in cuts),
        ("“Longer wins” is right", [format_share(split.longer_wins) for split in record.splits]),
        *(
            (f"Prompt tokens, {key}", [_percentile(split.prompt_tokens, key) for split in record.splits])
            for key in PERCENTILES
        ),
        *(
            (f"Response tokens, {key}", [_percentile(split.response_tokens, key) for split in record.splits])
            for key in PERCENTILES
        ),
    ]
    return Table(
        title="Rows",
        columns=("", *(split.name for split in record.splits)),
        rows=tuple((head, *cells) for head, cells in lines if set(cells) != {"–"}),
    )


def environment_tables(record: RunRecord) -> list[Table]:
    """What the run was made with and on: one table for each group of environment.json."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, value in record.environment.items():
        entries = value.items() if isinstance(value, Mapping) else [(key, value)]
        title = _plain(key).capitalize() if isinstance(value, Mapping) else "Run"
        groups.setdefault(title, []).extend((_plain(str(name)), _describe(str(name), entry)) for name, entry in entries)
    return [Table(title=title, columns=("", ""), rows=tuple(rows), numeric=False) for title, rows in groups.items()]


PERCENTILES = ("p10", "p50", "p90", "max")
"""Keys of the token counts in data.json."""


def _percentile(counts: Mapping[str, float], key: str) -> str:
    return format_count(counts.get(key))


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _describe(name: str, value: Any) -> str:
    """A value of environment.json as text: nested objects on one line, bytes with their unit, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{_plain(str(key))} {_describe(str(key), entry)}" for key, entry in value.items())
    if name.endswith("_bytes") and isinstance(value, int | float):
        return format_bytes(value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
