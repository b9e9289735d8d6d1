"""What a command prints when it is done: the few numbers that matter, and samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import category

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hydra_rlhf.reporting.collect import read_run
from hydra_rlhf.reporting.tables import cards

NUM_SAMPLES = 2


def print_summary(folder: Path, *, report: Path) -> None:
    """The numbers of a run, two before/after samples and where the report is."""
    record = read_run(folder)
    console = Console(highlight=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for card in cards(record):
        table.add_row(
            card.label, Text(f"{card.value} {card.unit}".strip(), style="bold"), Text(card.detail, style="dim")
        )
    console.print(table)
    compared = [sample for sample in record.samples if sample.kind == "evaluation"]
    print_samples([_as_row(sample) for sample in compared[:NUM_SAMPLES]])
    console.print(f"report  {report}", soft_wrap=True)


def print_samples(samples: Sequence[Mapping[str, Any]]) -> None:
    """Prompt, reference response and actor response one below the other, with scores."""
    console = Console(highlight=False)
    for sample in samples:
        console.print()
        console.print(Text("prompt     ", style="dim") + Text(printable(sample["prompt"])))
        for name, key in (("reference", "reference_"), ("actor", "")):
            score = sample[f"{key}score"]
            shown = Text("" if score is None else f"{score:+.2f}  ", style="bold")
            console.print(Text(f"{name:9}  ", style="dim") + shown + Text(printable(sample[f"{key}response"])))
    console.print()


def print_numbers(numbers: Mapping[str, Any]) -> None:
    """Every number of an evaluation, one a line."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in numbers.items():
        if value is not None and not is_nested(value):
            table.add_row(name, _plain(value))
    Console(highlight=False).print(table)


def is_nested(value: Any) -> bool:
    """Whether a value is a table of its own, which one line does not hold."""
    return isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(entry, dict | str) for entry in value)
    )


def printable(text: str) -> str:
    """Text with control characters written out, which a terminal would obey; spaces of every width stay."""
    return "".join(c if c.isprintable() or c == "\n" or category(c) == "Zs" else repr(c)[1:-1] for c in text)


def _as_row(sample: Any) -> dict[str, Any]:
    return {
        "prompt": sample.prompt,
        "response": sample.response,
        "score": sample.score,
        "reference_response": sample.reference_response,
        "reference_score": sample.reference_score,
    }


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_plain(entry) for entry in value)}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
