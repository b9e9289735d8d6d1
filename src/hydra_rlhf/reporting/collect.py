"""Reads one run folder into a typed record: the only file of the report that opens the run's files.

Any file may be missing (a run that is still going, or was killed, gets a report too), and what cannot be read is named
in `RunRecord.problems` instead of stopping the report. Imports no torch.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from hydra_rlhf.errors import CheckpointError
from hydra_rlhf.model.roles import ROLES, Role, RoleTable, rows_in_use
from hydra_rlhf.reporting.reading import finite, interval, number, tokens, verdicts
from hydra_rlhf.reporting.record import (
    Decision,
    Interval,
    MethodBytes,
    Option,
    RunRecord,
    Sample,
    Series,
    Split,
    Summary,
    Tokens,
)

RUN_FILES = (
    "recipe.yaml",
    "environment.json",
    "data.json",
    "metrics.jsonl",
    "samples.jsonl",
    "memory.json",
    "memory_plan.json",
    "summary.json",
)
"""What is read, each optional; a folder with none of them is not a run folder."""

RecordT = TypeVar("RecordT", Sample, MethodBytes, Option, Split, Summary)


def read_run(folder: Path) -> RunRecord:
    """Read a run folder. Raises CheckpointError where it is not one."""
    if not any((folder / name).is_file() for name in RUN_FILES):
        raise CheckpointError(
            f"{folder} is not a run folder: it holds none of {', '.join(RUN_FILES)}; "
            "give the folder that a run wrote, e.g. runs/demo"
        )
    problems: list[str] = []
    recipe_text, recipe = _recipe(folder / "recipe.yaml", problems)
    summary = _object(folder / "summary.json", problems)
    problems += [
        f"summary.json: {key} is {item}; it is left out"
        for key, item in summary.items()
        if number(item) is not None and finite(item) is None
    ]
    memory = _object(folder / "memory.json", problems)
    # memory.json is written at the end; the decisions are there from the start of each stage.
    known = _mapping(memory.get("decisions")) or _object(folder / "memory_plan.json", problems)
    decisions = tuple(_decision(stage, _mapping(row)) for stage, row in known.items())
    method = _text(recipe.get("method")) or _text(summary.get("method"))
    rows = {name: _mapping(row) for name, row in _mapping(memory.get("roles")).items()}
    written = {
        name: Role(str(row.get("trunk")), _text(row.get("adapter")), str(row.get("head"))) for name, row in rows.items()
    }
    return RunRecord(
        name=_text(recipe.get("name")) or _text(summary.get("name")) or folder.resolve().name,
        finished=bool(summary),
        method=method,
        recipe_text=recipe_text,
        recipe=recipe,
        environment=_object(folder / "environment.json", problems),
        curves=_curves(folder / "metrics.jsonl", problems),
        samples=tuple(_fill(Sample, row) for row in _lines(folder / "samples.jsonl", problems)),
        roles=written or _roles(method, _mapping(recipe.get("ppo"))),
        bytes_trained={name: value for name, row in rows.items() if (value := number(row.get("bytes_trained")))},
        memory_dtype=_text(memory.get("dtype")),
        methods={name: _fill(MethodBytes, row) for name, row in _mapping(memory.get("methods")).items()},
        plan=_plan(memory.get("plan")) or _own_plan(method, decisions),
        decisions=decisions,
        measured={phase: _numbers(row) for phase, row in _mapping(memory.get("measured")).items()},
        splits=tuple(_fill(Split, row, name=name) for name, row in _object(folder / "data.json", problems).items()),
        summary=_fill(Summary, summary),
        verdicts=verdicts(folder, problems),
        problems=tuple(problems),
    )


def _roles(method: str | None, ppo: Mapping[str, Any]) -> RoleTable:
    """The rows of an unfinished run by its settings."""
    return rows_in_use(
        ROLES.get(method or "", {}),
        with_reward=_mapping(ppo.get("reward")).get("reward_model_coef") != 0,
        with_critic=ppo.get("advantage_estimator", "gae") == "gae",
    )


def _decision(stage: str, row: Mapping[str, Any]) -> Decision:
    options = row.get("options")
    return Decision(
        stage=stage,
        fits=row.get("fits") is True,
        budget=finite(row.get("budget")) or 0.0,
        chosen=_fill(Option, row),
        options=tuple(_fill(Option, option) for option in options) if isinstance(options, list) else (),
        phases=_phases(row.get("phases")),
    )


def _phases(value: object) -> dict[str, dict[str, float]]:
    return {phase: _numbers(parts) for phase, parts in _mapping(value).items()}


def _plan(value: object) -> dict[str, dict[str, dict[str, float]]]:
    return {method: _phases(phases) for method, phases in _mapping(value).items()}


def _own_plan(method: str | None, decisions: tuple[Decision, ...]) -> dict[str, dict[str, Mapping[str, float]]]:
    """What an unfinished run has planned so far."""
    phases = {name: parts for decision in decisions for name, parts in decision.phases.items()}
    return {method: phases} if method is not None and phases else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _numbers(value: object) -> dict[str, float]:
    """The finite numbers of an object."""
    return {key: found for key, item in _mapping(value).items() if (found := finite(item)) is not None}


def _recipe(path: Path, problems: list[str]) -> tuple[str | None, Mapping[str, Any]]:
    import yaml

    if not path.is_file():
        return None, {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return text, _mapping(yaml.safe_load(text))
    except yaml.YAMLError:
        problems.append(f"{path.name} is not valid YAML; it is shown as text only")
        return text, {}


def _object(path: Path, problems: list[str]) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8", errors="replace")))
    except ValueError:
        problems.append(f"{path.name} is not valid JSON; it is left out")
        return {}


def _lines(path: Path, problems: list[str]) -> Iterator[Mapping[str, Any]]:
    """The objects of a JSON-lines file. A broken last line is what an interrupted run leaves: dropped in silence."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for index, line in enumerate(lines):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            row = None
        if isinstance(row, dict):
            yield row
        elif line.strip() and index < len(lines) - 1:
            problems.append(f"{path.name} line {index + 1} is not a JSON object; it is left out")


def _curves(path: Path, problems: list[str]) -> dict[str, dict[str, Series]]:
    values: dict[str, dict[str, dict[int, float]]] = {}
    for row in _lines(path, problems):
        step = number(row.get("step"))
        if step is None or not math.isfinite(step):
            continue
        stage = values.setdefault(str(row.get("stage")), {})
        for key, item in row.items():
            if key != "step" and (value := number(item)) is not None:
                stage.setdefault(key, {})[int(step)] = value
    return {
        stage: {
            key: Series(tuple(sorted(by_step)), tuple(by_step[s] for s in sorted(by_step)))
            for key, by_step in metrics.items()
        }
        for stage, metrics in values.items()
    }


READERS: Mapping[Any, Callable[[object], Any]] = {
    str: lambda value: "" if value is None else str(value),
    str | None: _text,
    int: lambda value: int(finite(value) or 0),
    float: lambda value: finite(value) or 0.0,
    float | None: finite,
    Interval | None: interval,
    bool | None: lambda value: value if isinstance(value, bool) else None,
    Tokens | None: tokens,
    Mapping[str, float]: _numbers,
}
"""How a field of each type is read from JSON; what is not of that type counts as missing."""


def _fill(record_class: type[RecordT], row: object, **known: Any) -> RecordT:
    """A record with each field read from the row's key of that name."""
    values = _mapping(row)
    return record_class(
        **{part.name: READERS[part.type](values.get(part.name)) for part in fields(record_class)} | known
    )
