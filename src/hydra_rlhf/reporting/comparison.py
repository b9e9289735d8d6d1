"""The report of `compare`: JSON, Markdown and one HTML page, from the same numbers; and what the terminal shows."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from hydra_rlhf.reporting.markdown import as_block, as_inline, as_table
from hydra_rlhf.reporting.render import templates
from hydra_rlhf.reporting.svg import BLUE, INK, MUTED, draw_svg
from hydra_rlhf.reporting.tables import NBSP, Table, format_count, format_interval, format_number, format_share
from hydra_rlhf.runtime.files import clear_write_errors, write_file

MAX_CHARACTERS = 2000
"""Longer texts of samples are cut."""
NUM_SAMPLES_IN_MARKDOWN = 3
STRONGEST_SHADE = 55
"""Per cent of colour in a cell of the heat map where one player wins everything."""
PLAYER_COLUMNS = {
    "kl": "KL from its start, nats",
    "kl_bound": "KL at most, nats",
    "response_tokens_mean": "tokens",
    "response_characters_mean": "characters",
    "eos_frac": "ended",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
}
"""Numbers of a player and how their columns are headed; columns without any number are left out."""

Comparison = Mapping[str, Any]
JudgeResult = Mapping[str, Any]


def write_comparison(comparison: Comparison, file: Path) -> Path:
    """Write `file` (.json) and, beside it, the same as .md and .html; returns the page."""
    texts = {
        ".json": json.dumps(comparison, indent=1, allow_nan=False) + "\n",
        ".md": render_markdown(comparison),
        ".html": render_html(comparison),
    }
    for suffix, text in texts.items():
        with clear_write_errors(file.with_suffix(suffix)):
            write_file(file.with_suffix(suffix), text.encode("utf-8", errors="replace"))
    return file.with_suffix(".html")


def render_markdown(comparison: Comparison) -> str:
    """The whole report as plain text."""
    names = names_of(comparison)
    parts = ["# Comparison", as_inline(subtitle(comparison)), "## Players", as_table(player_table(comparison))]
    for judge in comparison["judges"]:
        parts += [f"## Judged by {as_inline(judge['judge'])}", as_table(strength_table(names, judge))]
        parts += [as_table(matrix_table(names, judge, key, title)) for key, title in MATRICES]
        parts += [as_inline(line) for line in judge_notes(judge)]
    for number, sample in enumerate(comparison["samples"][:NUM_SAMPLES_IN_MARKDOWN], 1):
        parts += [f"## Sample {number}", as_block(sample["prompt"])]
        for player, text in sample["responses"]:
            parts += [f"**{as_inline(player)}**", as_block(text)]
    return "\n\n".join([*parts, EXPLANATION]) + "\n"


MATRICES = (
    ("win_rates", "Win rate of the row against the column [95 %]"),
    ("length_controlled_win_rates", "The same at equal length [95 %]"),
)
EXPLANATION = (
    "A tie counts half. Strengths are Bradley-Terry log-odds over the first player: sigmoid of a difference is the "
    "chance to win. Intervals of strengths and of length-controlled rates are resampled over prompts, and over seeds "
    "where a player has several runs; with fewer than five seeds they are too narrow. docs/metrics.md has the formulas."
)


def render_html(comparison: Comparison) -> str:
    """The page as one string, without scripts and network."""
    names = names_of(comparison)
    judges = [
        {
            "name": judge["judge"],
            "chart": strength_chart(names, judge, f"strengths-{number}"),
            "strengths": strength_table(names, judge),
            "maps": [heat_map(names, judge, key, title) for key, title in MATRICES],
            "notes": judge_notes(judge),
        }
        for number, judge in enumerate(comparison["judges"])
    ]
    samples = [
        {"prompt": cut(sample["prompt"]), "responses": [(player, cut(text)) for player, text in sample["responses"]]}
        for sample in comparison["samples"]
    ]
    return (
        templates()
        .get_template("compare.html.j2")
        .render(
            subtitle=subtitle(comparison),
            names=names,
            players=player_table(comparison),
            judges=judges,
            samples=samples,
            explanation=EXPLANATION,
        )
    )


def names_of(comparison: Comparison) -> list[str]:
    """The players' names, in order."""
    return [player["name"] for player in comparison["players"]]


def subtitle(comparison: Comparison) -> str:
    """What was compared, in a line."""
    num_runs = sum(len(player["runs"]) for player in comparison["players"])
    return (
        f"{len(comparison['players'])} players, {num_runs} sets of answers to {comparison['num_prompts']} held-out "
        f"prompts, one sample each, seed {comparison['seed']}"
    )


def player_table(comparison: Comparison) -> Table:
    """Who plays and what their answers look like."""
    players = comparison["players"]
    columns = [key for key in PLAYER_COLUMNS if any(player.get(key) is not None for player in players)]
    rows = tuple(
        (
            player["name"],
            *(format_share(player[key]) if key == "eos_frac" else format_number(player.get(key)) for key in columns),
            "; ".join(f"{run} ({c})" for run, c in zip(player["runs"], player["checkpoints"], strict=True)),
        )
        for player in players
    )
    return Table(title="", columns=("", *(PLAYER_COLUMNS[key] for key in columns), "from"), rows=rows)


def strength_table(names: Sequence[str], judge: JudgeResult) -> Table:
    """Every player's strength over the first one, the strongest first."""
    scores = judge.get("mean_scores", {})
    rows = [
        (
            name,
            format_number(row["strength"]),
            f"{format_number(row['ci'][0])} to {format_number(row['ci'][1])}",
            *((format_number(scores[name]),) if scores else ()),
        )
        for name, row in zip(names, judge["strengths"], strict=True)
    ]
    order = sorted(range(len(names)), key=lambda i: -judge["strengths"][i]["strength"])
    columns = ("", f"strength over {names[0]}, log-odds", f"95{NBSP}%", *(("mean score",) if scores else ()))
    return Table(title="Bradley-Terry strengths", columns=columns, rows=tuple(rows[i] for i in order))


def matrix_table(names: Sequence[str], judge: JudgeResult, key: str, title: str) -> Table:
    """Rates of every player against every other."""
    rows = tuple((name, *(cell_text(cell) for cell in row)) for name, row in zip(names, judge[key], strict=True))
    return Table(title=title, columns=("", *names), rows=rows)


def cell_text(cell: Mapping[str, Any] | None) -> str:
    """A rate with its interval; a dash on the diagonal."""
    return "–" if cell is None else f"{format_share(cell['rate'])} [{interval_text(cell)}]"


def interval_text(cell: Mapping[str, Any]) -> str:
    """A rate's interval."""
    low, high = cell["ci"]
    return format_interval((low, high))


def heat_map(names: Sequence[str], judge: JudgeResult, key: str, title: str) -> dict[str, Any]:
    """A matrix with a colour for each cell: blue where the row wins, orange where it loses, the paler the closer."""
    rows = []
    for name, row in zip(names, judge[key], strict=True):
        cells = []
        for cell in row:
            edge = 0.0 if cell is None else 2 * cell["rate"] - 1
            counts = (
                f"{cell['wins']} wins, {cell['ties']} ties, {cell['losses']} losses, {cell['failed']} not judged"
                if cell is not None and "wins" in cell
                else ""
            )
            cells.append(
                {
                    "rate": "–" if cell is None else format_share(cell["rate"]),
                    "interval": "" if cell is None else interval_text(cell),
                    "counts": counts,
                    "color": "var(--blue)" if edge > 0 else "var(--orange)",
                    "shade": round(STRONGEST_SHADE * abs(edge)),
                }
            )
        rows.append({"name": name, "cells": cells})
    return {"title": title, "rows": rows}


def strength_chart(names: Sequence[str], judge: JudgeResult, key: str) -> str:
    """Strengths with their intervals, one below the other."""
    found = judge["strengths"]

    def draw(axes: Any) -> None:
        places = list(range(len(names)))[::-1]
        axes.axvline(0, color=MUTED, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
        for place, row in zip(places, found, strict=True):
            axes.plot(row["ci"], [place, place], color=BLUE, linewidth=2, solid_capstyle="butt")
            axes.plot([row["strength"]], [place], marker="o", color=BLUE)
        axes.set_yticks(places, [cut(name, 28) for name in names], color=INK)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlabel(f"log-odds over {cut(names[0], 28)}")

    words = "; ".join(
        f"{name}: {format_number(row['strength'])}, {format_number(row['ci'][0])} to {format_number(row['ci'][1])}"
        for name, row in zip(names, found, strict=True)
    )
    return draw_svg(draw, key, f"Strengths. {words}", width=560, height=70 + 34 * len(names))


def judge_notes(judge: JudgeResult) -> list[str]:
    """What has to be known of how a judge was asked."""
    asked = judge.get("asked")
    if asked is None:
        return []
    decided = asked["num_first_wins"] + asked["num_second_wins"]
    lines = [
        f"{format_count(asked['num_judged'])} of {format_count(asked['num_comparisons'])} comparisons judged, "
        f"{asked['num_failed']} failed; {asked['num_identical']} of equal texts; {asked['num_disagreements']} where "
        "the two orders disagreed, counted as ties.",
        f"{format_count(asked['num_requests'])} requests, {format_count(asked['num_cached'])} answers from the cache; "
        f"{format_count(asked['prompt_tokens'])} tokens read and {format_count(asked['completion_tokens'])} written.",
    ]
    if decided:
        share = format_share(asked["num_first_wins"] / decided)
        lines.append(f"The response shown first won {share} of the decided verdicts (no bias: 50.0{NBSP}%).")
    lines += [f"{count} times: {reason}" for reason, count in asked["failures"].items()]
    return lines


def cut(text: str, length: int = MAX_CHARACTERS) -> str:
    """A text, shortened where it is too long for its place."""
    return text if len(text) <= length else text[: length - 1] + "…"


def print_judges(names: Sequence[str], judges: Sequence[JudgeResult]) -> None:
    """Win rates and strengths of every judge on the terminal."""
    console = Console(highlight=False)
    for judge in judges:
        table = RichTable(title=Text(f"judged by {judge['judge']}"), title_justify="left", box=None, pad_edge=False)
        table.add_column("")
        for name in (*names, "strength"):
            table.add_column(Text(f"against {name}" if name in names else name), justify="right")
        for name, row, strength in zip(names, judge["win_rates"], judge["strengths"], strict=True):
            interval = f"[{format_number(strength['ci'][0])}, {format_number(strength['ci'][1])}]"
            cells = [Text(cell_text(cell)) for cell in row]
            table.add_row(Text(name), *cells, Text(f"{format_number(strength['strength'])} {interval}"))
        console.print(table)
        for line in judge_notes(judge):
            console.print(Text(line, style="dim"))
        console.print()
