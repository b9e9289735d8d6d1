"""Values of JSON files as the types of the report's record; what is not of that type counts as missing. No torch."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra_rlhf.reporting.record import Interval, Tokens, Verdict

NOT_NUMBERS = ("ids", "pieces", "names")
"""Parts of a token record that are not one number per token."""
PLAYERS = ("actor", "start")
"""Who is compared: the row and the column of a table of win rates that the report shows."""


def number(value: object) -> float | None:
    """A float from JSON, where non-finite ones are the words "nan", "inf" and "-inf"; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return float(value) if isinstance(value, str) and value in ("nan", "inf", "-inf") else None


def finite(value: object) -> float | None:
    """A finite float from JSON; None for anything else."""
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def interval(value: object) -> Interval | None:
    """Two finite ends from JSON; None for anything else."""
    ends = [finite(end) for end in value] if isinstance(value, list) else []
    return (ends[0], ends[1]) if len(ends) == 2 and ends[0] is not None and ends[1] is not None else None


def tokens(value: object) -> Tokens | None:
    """The tokens of a sample; None where there are none, or where they are not as many in each of their lists."""
    row = value if isinstance(value, dict) else {}
    pieces = row.get("pieces")
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
        return None
    lists = {key: entry for key, entry in row.items() if isinstance(entry, list)}
    if any(len(entry) != len(pieces) for entry in lists.values()):
        return None
    names = row.get("names")
    return Tokens(
        pieces=tuple(pieces),
        names={key: str(name) for key, name in names.items()} if isinstance(names, dict) else {},
        ids=tuple(int(finite(item) or 0) for item in lists.get("ids", ())),
        numbers={
            key: tuple(
                float(item) if isinstance(item, float | int) and math.isfinite(item) else math.nan for item in entry
            )
            for key, entry in lists.items()
            if key not in NOT_NUMBERS
        },
    )


def verdicts(folder: Path, problems: list[str]) -> tuple[Verdict, ...]:
    """Every judge's verdict in the folder's `evaluation-*.json`."""
    found: list[Verdict] = []
    for path in sorted(folder.glob("evaluation-*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        except ValueError:
            problems.append(f"{path.name} is not valid JSON; it is left out")
            continue
        if isinstance(content, dict):
            found += _verdicts_of(path.name, content)
    return tuple(found)


def _verdicts_of(file: str, content: Mapping[str, Any]) -> list[Verdict]:
    players, judges = content.get("players"), content.get("judges")
    if not isinstance(players, list) or not isinstance(judges, list) or not set(PLAYERS) <= set(map(str, players)):
        return []
    actor, start = (players.index(player) for player in PLAYERS)
    found: list[Verdict] = []
    for judge in judges:
        plain, controlled = (
            _cell(judge, table, actor, start) for table in ("win_rates", "length_controlled_win_rates")
        )
        rate = finite(plain.get("rate"))
        if rate is not None:
            found.append(
                Verdict(
                    file=file,
                    judge=str(judge.get("judge")),
                    rate=rate,
                    interval=interval(plain.get("ci")),
                    controlled_rate=finite(controlled.get("rate")),
                    controlled_interval=interval(controlled.get("ci")),
                )
            )
    return found


def _cell(judge: object, table: str, row: int, column: int) -> Mapping[str, Any]:
    """One entry of a judge's table of win rates; empty where there is none."""
    try:
        cell = judge[table][row][column]  # pyright: ignore[reportIndexIssue]
    except (TypeError, KeyError, IndexError):
        return {}
    return cell if isinstance(cell, dict) else {}
