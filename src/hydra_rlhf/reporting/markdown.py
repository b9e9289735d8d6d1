"""The report as plain text: the same numbers, warnings and tables as the page, and a few samples."""

import re

from hydra_rlhf.reporting.evaluation_tables import evaluation_table, sides_table, verdicts_table
from hydra_rlhf.reporting.findings import find_problems
from hydra_rlhf.reporting.memory_tables import (
    decisions_table,
    measured_table,
    memory_table,
    options_table,
    planned_table,
)
from hydra_rlhf.reporting.record import RunRecord, Sample
from hydra_rlhf.reporting.tables import (
    Card,
    Table,
    cards,
    data_table,
    environment_tables,
    format_score,
    roles_table,
    stages_table,
)

NUM_SAMPLES = 4
"""Samples shown; the page has them all."""
MAX_CHARACTERS = 1000
"""Longer texts are cut."""
MEMORY_TABLES = (planned_table, decisions_table, options_table, memory_table, measured_table)


def render_markdown(record: RunRecord) -> str:
    """The whole `report.md`."""
    parts = [f"# {as_inline(record.name)}", _subtitle(record)]
    parts += [_card_list(found)] if (found := cards(record)) else []
    if warnings := find_problems(record):
        lines = [
            f"- **{as_inline(w.title)}.** {as_inline(w.text)} *What to do:* {as_inline(w.remedy)}" for w in warnings
        ]
        parts += ["## Warnings", "\n".join(lines)]
    if record.problems:
        parts += [
            "## Files that could not be read",
            "\n".join(f"- {as_inline(problem)}" for problem in record.problems),
        ]
    for title, tables in (
        ("What was run", (roles_table(record), stages_table(record))),
        ("Evaluation", tuple(table(record) for table in (evaluation_table, sides_table, verdicts_table))),
        ("Memory", tuple(table(record) for table in MEMORY_TABLES)),
        ("Data", (data_table(record),)),
        ("Environment", environment_tables(record)),
    ):
        found_tables = [table for table in tables if table is not None]
        parts += [f"## {title}"] if found_tables else []
        parts += [as_table(table) for table in found_tables]
        if title == "What was run" and (samples := record.comparison()):
            parts += [
                "## Samples",
                *(_sample(number, sample) for number, sample in enumerate(samples[:NUM_SAMPLES], 1)),
            ]
    if record.recipe_text is not None:
        parts += ["## Settings", as_block(record.recipe_text.rstrip("\n"), "yaml")]
    return "\n\n".join(parts) + "\n"


def _subtitle(record: RunRecord) -> str:
    facts = [
        f"method {record.method}" if record.method else None,
        record.setting("model.path"),
        record.setting("data.train"),
    ]
    state = "finished" if record.finished else "not finished: these are the numbers so far"
    return (
        " · ".join(as_inline(str(fact)) for fact in (*facts, state) if fact)
        + " · curves and all samples: `report.html`"
    )


def _card_list(found: list[Card]) -> str:
    rows = tuple((card.label, f"{card.value} {card.unit}".strip(), card.detail) for card in found)
    return as_table(Table(title="", columns=("", "Value", "Beside it"), rows=rows, numeric=False))


def as_table(table: Table) -> str:
    """A table in Markdown."""
    rule = ["---", *("---:" if table.numeric else "---" for _ in table.columns[1:])]
    rows = [
        [f"**{cell}**" if index in table.marked and cell else cell for cell in map(as_inline, row)]
        for index, row in enumerate(table.rows)
    ]
    lines = ["| " + " | ".join(cells) + " |" for cells in (map(as_inline, table.columns), rule, *rows)]
    return "\n".join(([f"**{as_inline(table.title)}**", ""] if table.title else []) + lines)


def _sample(number: int, sample: Sample) -> str:
    parts = [f"### {number}", "Prompt", as_block(sample.prompt)]
    for who, text, score, gold in (
        ("Reference", sample.reference_response, sample.reference_score, sample.reference_gold),
        ("Actor", sample.response, sample.score, sample.gold),
    ):
        if text is not None:
            numbers = [
                f"{name} {format_score(value)}"
                for name, value in (("score", score), ("gold", gold))
                if value is not None
            ]
            parts += [", ".join([who, *numbers]), as_block(text)]
    return "\n\n".join(parts)


def as_inline(text: str) -> str:
    """Text on one line of Markdown, in which nothing is markup or ends a table cell."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text.replace("\r", " ").replace("\n", " "))


def as_block(text: str, language: str = "") -> str:
    """A fenced block, with a fence longer than any in the text; long texts are cut with a note."""
    shown = text if language or len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS]
    longest = max((len(run) for run in re.findall(r"`{3,}", shown)), default=2)
    fence = "`" * (longest + 1)
    note = "" if len(shown) == len(text) else f"\n\n({len(text) - len(shown):,} more characters in samples.jsonl)"
    return f"{fence}{language}\n{shown}\n{fence}{note}"
