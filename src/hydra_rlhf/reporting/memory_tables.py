"""The tables of a report's memory section: counted, planned and measured bytes, and how the settings were found."""

from dataclasses import fields

from hydra_rlhf.memory.count import PARTS
from hydra_rlhf.reporting.record import MethodBytes, Option, RunRecord
from hydra_rlhf.reporting.tables import Table, byte_unit, format_bytes, format_count, format_number


def memory_table(record: RunRecord) -> Table | None:
    """Counted bytes of every method, in one unit."""
    if not record.methods:
        return None
    unit, size = byte_unit(max(method.total for method in record.methods.values()))
    parts = [part.name for part in fields(MethodBytes)]
    rows = tuple(
        (name, *(f"{getattr(method, part) / size:,.2f}" for part in (*parts, "total")))
        for name, method in record.methods.items()
    )
    return Table(
        title=f"Counted bytes of each method, in {unit}",
        columns=("Method", *(part.capitalize() for part in parts), "Total"),
        rows=rows,
        marked=tuple(index for index, name in enumerate(record.methods) if name == record.method),
    )


def planned_table(record: RunRecord) -> Table | None:
    """Planned bytes of every phase of every method, in one unit, with what this run measured."""
    lines = [(method, phase, parts) for method, phases in record.plan.items() for phase, parts in phases.items()]
    if not lines:
        return None
    unit, size = byte_unit(max(sum(parts.values()) for _, _, parts in lines))
    rows = []
    for method, phase, parts in lines:
        planned = sum(parts.values())
        numbers = [*(parts.get(part, 0.0) for part in PARTS), planned]
        measured = record.measured_bytes(phase) if method == record.method else None
        beside = ("–", "–")
        if measured is not None and planned > 0:
            beside = (f"{measured / size:,.2f}", f"{100 * measured / planned:.0f}\u00a0%")
        rows.append((f"{method}: {phase}", *(f"{number / size:,.2f}" for number in numbers), *beside))
    return Table(
        title=f"Planned bytes of each phase with this run's settings, in {unit}",
        columns=("Phase", *(part.capitalize() for part in PARTS), "Total", "Measured", "of plan"),
        rows=tuple(rows),
        marked=tuple(index for index, (method, _, _) in enumerate(lines) if method == record.method),
    )


def decisions_table(record: RunRecord) -> Table | None:
    """The settings that the memory plan chose for each stage of this run."""
    if not record.decisions:
        return None
    rows = tuple(
        (
            decision.stage,
            *_settings(decision.chosen, decodes="rollout" in decision.phases),
            format_bytes(decision.chosen.peak),
            format_bytes(decision.budget),
            "yes" if decision.fits else "no",
        )
        for decision in record.decisions
    )
    columns = ("Stage", *SETTINGS, "Planned peak", "Budget for tensors", "Fits")
    return Table(title="Settings chosen by the memory plan", columns=columns, rows=rows)


def options_table(record: RunRecord) -> Table | None:
    """Every option that was looked at, the chosen ones marked."""
    lines = [(decision, option) for decision in record.decisions for option in decision.options]
    if not lines:
        return None
    rows = tuple(
        (
            decision.stage,
            *_settings(option, decodes="rollout" in decision.phases),
            format_bytes(option.peak),
            format_number(option.relative_time),
        )
        for decision, option in lines
    )
    return Table(
        title="Options the memory plan looked at",
        columns=("Stage", *SETTINGS, "Planned peak", "Relative time"),
        rows=rows,
        marked=tuple(index for index, (decision, option) in enumerate(lines) if option == decision.chosen),
    )


SETTINGS = ("Micro-batch, tokens", "Rows decoded together", "Layers recomputed")


def _settings(option: Option, *, decodes: bool) -> tuple[str, str, str]:
    rows = format_count(option.rollout_rows) if decodes else "–"
    return format_count(option.micro_batch_tokens), rows, format_count(option.checkpointed_layers)


def measured_table(record: RunRecord) -> Table | None:
    """Measured peaks of each phase, in one unit."""
    columns = list(dict.fromkeys(key for phase in record.measured.values() for key in phase))
    if not columns:
        return None
    unit, size = byte_unit(max(value for phase in record.measured.values() for value in phase.values()))
    rows = tuple(
        (phase, *(f"{values[key] / size:,.2f}" if key in values else "–" for key in columns))
        for phase, values in record.measured.items()
    )
    heads = tuple(key.removesuffix("_bytes").replace("_", " ").replace("rss", "RSS") for key in columns)
    return Table(title=f"Measured, in {unit}", columns=("Phase", *heads), rows=rows)
