"""Local file or hub name -> rows of strings and messages, with an account of everything that was left out. No torch.

`load_pairs`, `load_demonstrations` and `load_prompts` find the row format (`row_formats.py`), read every row, and stop
at malformed ones before anything else happens, or skip and count them (`DataConfig.on_bad_row`).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, cast

from hydra_rlhf.config import DataConfig
from hydra_rlhf.data.files import RawRow, file_suffix, read_file, read_hub
from hydra_rlhf.data.row_formats import FORMATS, Format, Kind, detect_format, named_format
from hydra_rlhf.data.rows import (
    BadRow,
    Demonstration,
    Message,
    PreferencePair,
    Prompt,
    PromptValue,
    Record,
    RowError,
    Rows,
    drop_duplicates,
    prompt_key,
    split_by_prompt,
    without_prompts_of,
)
from hydra_rlhf.errors import ConfigError, DataError

__all__ = [
    "BadRow",
    "Demonstration",
    "Message",
    "PreferencePair",
    "Prompt",
    "PromptValue",
    "Rows",
    "load_demonstrations",
    "load_pairs",
    "load_prompts",
    "load_rows",
    "prompt_key",
    "read_rows",
    "split_by_prompt",
    "without_prompts_of",
]

NUM_DETECTION_ROWS = 256
SETTING_OF_KIND: dict[Kind, str] = {"pairs": "train", "demonstrations": "demonstrations", "prompts": "prompts"}


def load_pairs(source: str | Path, config: DataConfig | None = None, *, split: str = "train") -> Rows[PreferencePair]:
    """Preference pairs of a local file or of `split` of a hub data set, in file order, without exact duplicates.

    DataError names file and line of the first malformed row, and a file whose rows fit no known format.
    """
    return cast(Rows[PreferencePair], load_rows(source, config or DataConfig(), ("pairs",), split=split))


def load_demonstrations(
    source: str | Path, config: DataConfig | None = None, *, split: str = "train"
) -> Rows[Demonstration]:
    """Demonstrations of a local file or hub data set; errors as in `load_pairs`."""
    return cast(Rows[Demonstration], load_rows(source, _beside(config), ("demonstrations",), split=split))


def load_prompts(source: str | Path, config: DataConfig | None = None, *, split: str = "train") -> Rows[Prompt]:
    """The different prompts of any file that has prompts: alone, with demonstrations or with pairs.

    A prompt that comes again is a counted drop (`repeated_prompt`). Errors as in `load_pairs`.
    """
    rows = load_rows(source, _beside(config), ("prompts", "pairs", "demonstrations"), split=split)
    prompts = rows.prompts
    repeated = len(rows) - len(prompts)
    dropped = rows.dropped | ({"repeated_prompt": repeated} if repeated else {})
    return Rows(
        rows=prompts,
        source=rows.source,
        format=rows.format,
        rows_read=rows.rows_read,
        dropped=dropped,
        bad_rows=rows.bad_rows,
    )


def load_rows(source: str | Path, config: DataConfig, kinds: tuple[Kind, ...], *, split: str) -> Rows[Any]:
    """`read_rows`, stopping at malformed rows unless they are to be skipped, and where no row can be used."""
    rows = read_rows(source, config, kinds, split=split)
    if rows.bad_rows and config.on_bad_row == "error":
        more = f" (the first of {len(rows.bad_rows)} bad rows)" if len(rows.bad_rows) > 1 else ""
        raise DataError(
            f"{rows.bad_rows[0]}{more}; correct the file, or set data.on_bad_row=skip to leave such rows out. "
            f"`hydra-rlhf data check {source}` lists them"
        )
    if not rows.rows:
        left_out = [f"{count} x {reason}" for reason, count in rows.dropped.items()]
        left_out += [f"{len(rows.bad_rows)} bad rows, first {rows.bad_rows[0]}"] if rows.bad_rows else []
        raise DataError(f"{source}: none of its {rows.rows_read} rows can be used ({'; '.join(left_out)})")
    return rows


def read_rows(source: str | Path, config: DataConfig, kinds: tuple[Kind, ...], *, split: str) -> Rows[Any]:
    """Rows of any of `kinds`, the first preferred where a row fits several; malformed ones are collected, not raised.

    ConfigError for unknown names in `config.format` and `config.columns`; DataError for a file that cannot be read at
    all, holds no rows, or rows of no known format.
    """
    source = str(source)
    raw = _raw_rows(source, config, split)
    head = list(islice(raw, NUM_DETECTION_ROWS))
    if not head:
        raise DataError(f"{source}: holds no rows")
    columns = _known_columns(config, head, must_fit="pairs" in kinds[:1])
    name = _format_name(
        source, config, kinds, [_rename(row.value, columns) for row in head if row.problem is None], head
    )
    records: list[Any] = []
    dropped: Counter[str] = Counter()
    bad_rows: list[BadRow] = []
    seen: set[str] = set()
    rows_read = 0
    for row in chain(head, raw):
        if config.max_rows is not None and len(records) >= config.max_rows:
            break
        rows_read += 1
        try:
            found, left_out = _read_row(row, FORMATS[name], columns)
        except RowError as error:
            bad_rows.append(BadRow(source, row.line, str(error), _unit(source)))
            continue
        fresh = drop_duplicates(found, seen)
        dropped.update(left_out)
        dropped.update({"duplicate": len(found) - len(fresh)})
        records += fresh
    return Rows(
        rows=records[: config.max_rows],
        source=source,
        format=name,
        rows_read=rows_read,
        dropped=dict(+dropped),  # without the reasons that were never met
        bad_rows=bad_rows,
    )


def _beside(config: DataConfig | None) -> DataConfig:
    """The settings for data beside the pairs: `format` describes the pairs, and `columns` holds where it fits."""
    return replace(config or DataConfig(), format="auto")


def _raw_rows(source: str, config: DataConfig, split: str) -> Iterator[RawRow]:
    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError(f"{source}: is a folder; name one file in it")
    if path.exists():
        return read_file(path, config.max_row_bytes)
    if file_suffix(path) is not None or source.startswith((".", "/", "~")):
        raise DataError(f"{source}: there is no such file")
    return read_hub(source, split, config.max_row_bytes)


def _unit(source: str) -> Literal["line", "row"]:
    suffix = file_suffix(Path(source))
    return "row" if suffix in (None, ".parquet") else "line"


def _known_columns(config: DataConfig, head: list[RawRow], *, must_fit: bool) -> dict[str, str]:
    """The column map as far as the rows have its columns; ConfigError for a field that no format has.

    Where the map `must_fit` (it describes the pairs, not the data beside them), also for a column that no row has,
    unless the rows already use our name.
    """
    ours = {name for row_format in FORMATS.values() for name in (*row_format.fields, *row_format.optional)}
    keys = {key for row in head for key in row.value}
    for name, theirs in config.columns.items():
        if name not in ours:
            near = get_close_matches(name, ours, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the names to map to are {', '.join(sorted(ours))}"
            raise ConfigError(f"data.columns maps {name!r}, which is no field of any row format; {hint}")
        if must_fit and keys and theirs not in keys and name not in keys:
            near = get_close_matches(theirs, keys, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the rows have {', '.join(sorted(keys))}"
            raise ConfigError(f"data.columns reads {name!r} from {theirs!r}, which no row has; {hint}")
    return {name: theirs for name, theirs in config.columns.items() if theirs in keys}


def _rename(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """`row` under our field names."""
    taken = {**dict.fromkeys(columns), **dict.fromkeys(columns.values())}
    rest = {name: value for name, value in row.items() if name not in taken}
    return {**rest, **{name: row[theirs] for name, theirs in columns.items() if theirs in row}}


def _format_name(
    source: str, config: DataConfig, kinds: tuple[Kind, ...], rows: list[dict[str, Any]], head: list[RawRow]
) -> str:
    """The named or detected format, of one of `kinds`; DataError or ConfigError otherwise."""
    if config.format != "auto":
        name = config.format
        kind = named_format(name).kind
    else:
        found = detect_format(rows, kinds) or detect_format(rows, ("pairs", "demonstrations", "prompts"))
        if found is None and not rows:
            raise DataError(
                f"{BadRow(source, head[0].line, str(head[0].problem), _unit(source))} ({len(head)} bad rows)"
            )
        if found is None:
            keys = sorted({str(key) for row in rows for key in row})
            known = "; ".join(f"{name} ({', '.join(item.fields)})" for name, item in FORMATS.items())
            raise DataError(
                f"{source}: no known row format fits; its rows have the fields {', '.join(keys) or '(none)'}. Map them "
                f"with data.columns or name one in data.format. Known formats: {known}"
            )
        name, kind = found, FORMATS[found].kind
    if kind not in kinds:
        raise DataError(
            f"{source}: its rows are {kind} (format {name!r}) where {' or '.join(kinds)} are needed; "
            f"such a file belongs in data.{SETTING_OF_KIND[kind]}"
        )
    return name


def _read_row(row: RawRow, row_format: Format, columns: dict[str, str]) -> tuple[list[Record], dict[str, int]]:
    """The records of one row, its further fields in their `columns`; RowError if it is malformed."""
    if row.problem is not None:
        raise RowError(row.problem)
    value = _rename(row.value, columns)
    for name, theirs in columns.items():
        if name in row_format.fields and theirs not in row.value:
            raise RowError(f"field '{theirs}' (data.columns reads '{name}' from it) is missing")
    reading = row_format.read(value)
    used = {*row_format.fields, *row_format.optional}
    rest = {name: item for name, item in value.items() if name not in used}
    return [replace(record, columns=rest) for record in reading.records], reading.dropped
