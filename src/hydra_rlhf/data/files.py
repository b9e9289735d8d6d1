"""Files and hub data sets -> raw rows with their line numbers. Problems are reported per row where that is possible.

Bytes that are not UTF-8 are carried as surrogates (`surrogateescape`) where a file is decoded as a whole, so that one
bad row is one bad row. Imports no torch; `pyarrow` and `datasets` only where they are used.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from hydra_rlhf.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
NOT_UTF8 = "not valid UTF-8; save the file as UTF-8"
LONE_SURROGATE = "holds half of a surrogate pair (an escape such as \\ud83d alone), which is no text"


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as its container holds it: an object, or the reason why it is none."""

    line: int
    """First line of the row, from 1 (row number in Parquet and hub data sets)."""
    value: dict[str, Any]
    """The row's fields; empty where `problem` is set."""
    problem: str | None = None
    """Why the row cannot be read."""


def read_file(path: Path, max_row_bytes: int) -> Iterator[RawRow]:
    """The rows of a local file in order. DataError for what ends the reading: suffix, broken archive or array."""
    suffix = file_suffix(path)
    if suffix is None:
        raise DataError(f"{path}: unknown kind of file; it must end in one of {', '.join(SUFFIXES)}")
    try:
        if suffix == ".parquet":
            yield from _read_parquet(path, max_row_bytes)
            return
        with gzip.open(path, "rb") if suffix.endswith(".gz") else path.open("rb") as stream:
            if suffix.startswith(".csv"):
                yield from _read_csv(stream, path, max_row_bytes)
            elif suffix.startswith(".json") and not suffix.startswith(".jsonl") and _is_array(stream):
                yield from _read_json_array(stream, path, max_row_bytes)
            else:
                yield from _read_json_lines(stream, max_row_bytes)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: the gzip archive is damaged ({error}); copy or download the file again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_hub(name: str, split: str, max_row_bytes: int) -> Iterator[RawRow]:
    """The rows of one split of a hub data set; HF_HUB_OFFLINE is honoured, remote code is never run."""
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split)
    except (
        Exception
    ) as error:  # whatever hub, network, cache or builder raise: the reader of the message needs the reason
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"{name}: there is no such file, and it could not be loaded as a hub dataset either, split {split!r} "
            f"({reason}); give the path of a file ({', '.join(SUFFIXES)}) or a dataset name that this machine can reach"
        ) from error
    for number, row in enumerate(dataset, 1):
        assert isinstance(row, dict)
        yield _sized(RawRow(number, row), _text_bytes(row), max_row_bytes)


def file_suffix(path: Path) -> str | None:
    """Which of SUFFIXES the file's name ends in."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def _too_large(num_bytes: int, max_row_bytes: int) -> str:
    return f"the row has {num_bytes} bytes, more than data.max_row_bytes={max_row_bytes}"


def _sized(row: RawRow, num_bytes: int, max_row_bytes: int) -> RawRow:
    """`row`, or its rejection if it is larger than allowed."""
    return row if num_bytes <= max_row_bytes else RawRow(row.line, {}, _too_large(num_bytes, max_row_bytes))


def _read_json_lines(stream: io.BufferedIOBase, max_row_bytes: int) -> Iterator[RawRow]:
    """One object a line; blank lines are passed over. A line that is too long is never held in memory."""
    line = 0
    while raw := stream.readline(max_row_bytes + 2):
        line += 1
        if line == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if len(raw.rstrip(b"\r\n")) > max_row_bytes:
            num_bytes = len(raw)
            while not raw.endswith(b"\n") and (raw := stream.readline(1 << 20)):
                num_bytes += len(raw)
            yield RawRow(line, {}, _too_large(num_bytes, max_row_bytes))
        elif raw.strip():
            yield _parse_line(raw.rstrip(b"\r\n"), line)


def _parse_line(raw: bytes, line: int) -> RawRow:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RawRow(line, {}, f"{NOT_UTF8} (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        return RawRow(line, {}, f"broken JSON at column {error.colno} ({error.msg})")
    except (ValueError, RecursionError) as error:
        return RawRow(line, {}, f"JSON that cannot be read ({error})")
    return _object_row(value, line, suspicious=b"\\u" in raw)


def _object_row(value: Any, line: int, *, suspicious: bool) -> RawRow:
    """A parsed JSON value as a row; `suspicious` text is searched for surrogates, which no tokenizer takes."""
    if not isinstance(value, dict):
        return RawRow(line, {}, f"a row must be an object with named fields, this is {type(value).__name__}")
    try:
        problem = LONE_SURROGATE if suspicious and _has_surrogate(value) else None
    except RecursionError:
        problem = "is nested too deeply"
    return RawRow(line, {} if problem else value, problem)


def _has_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return re.search("[\ud800-\udfff]", value) is not None
    if isinstance(value, dict):
        return any(_has_surrogate(part) for pair in value.items() for part in pair)
    return isinstance(value, list) and any(_has_surrogate(part) for part in value)


def _is_array(stream: io.BufferedIOBase) -> bool:
    """Whether a .json file is one array; otherwise it is read as one object a line. Rewinds the stream."""
    start = stream.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    stream.seek(0)
    return start.startswith(b"[")


def _read_json_array(stream: io.BufferedIOBase, path: Path, max_row_bytes: int) -> Iterator[RawRow]:
    """The elements of one array, each with the line it starts on; DataError at the place where the syntax breaks."""
    text = stream.read().decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    decoder = json.JSONDecoder()
    blank = re.compile(r"[ \t\r\n]*")

    def skip(position: int) -> int:
        match = blank.match(text, position)
        assert match is not None
        return match.end()

    def broken(position: int, expected: str) -> DataError:
        line = text.count("\n", 0, position) + 1
        column = position - text.rfind("\n", 0, position)
        return DataError(
            f"{path}:{line}: broken JSON at column {column} ({expected}); the array cannot be read beyond it"
        )

    position, line, counted = skip(skip(0) + 1), 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise broken(error.pos, error.msg) from error
        except (ValueError, RecursionError) as error:
            raise broken(position, str(error)) from error
        raw = text[position:end]
        if re.search("[\ud800-\udfff]", raw):
            yield RawRow(line, {}, NOT_UTF8)
        else:
            yield _sized(_object_row(value, line, suspicious="\\u" in raw), len(raw.encode()), max_row_bytes)
        position = skip(end)
        if text[position : position + 1] == ",":
            position = skip(position + 1)
        elif text[position : position + 1] != "]":
            raise broken(position, "',' or ']' expected")
    if skip(position + 1) != len(text):
        raise broken(skip(position + 1), "something follows the array")


def _read_csv(stream: io.BufferedIOBase, path: Path, max_row_bytes: int) -> Iterator[RawRow]:
    """Comma-separated rows with a header; fields in quotes may hold line breaks. A row's line is where it starts."""
    # The csv module refuses fields over 128 KiB unless told otherwise; rows are limited by max_row_bytes instead.
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 30))
    with io.TextIOWrapper(
        cast("IO[bytes]", stream), encoding="utf-8-sig", errors="surrogateescape", newline=""
    ) as text:
        reader = csv.reader(text, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                unclosed = "unexpected end" in str(error)
                yield RawRow(line, {}, "a quoted field is never closed" if unclosed else f"broken CSV ({error})")
                continue
            if header is None and fields:
                header = _check_header(fields, f"{path}:{line}")
            elif header is not None and fields:
                yield _csv_row(header, fields, line, max_row_bytes)


def _check_header(names: list[str], place: str) -> list[str]:
    if _has_surrogate(names):
        raise DataError(f"{place}: the header is {NOT_UTF8}")
    repeated = sorted({name for name in names if name and names.count(name) > 1})
    if repeated:
        raise DataError(f"{place}: the header names {', '.join(repeated)} more than once; rename one of them")
    return names


def _csv_row(header: list[str], fields: list[str], line: int, max_row_bytes: int) -> RawRow:
    if len(fields) != len(header):
        return RawRow(line, {}, f"has {len(fields)} fields, the header has {len(header)}")
    if _has_surrogate(fields):
        return RawRow(line, {}, NOT_UTF8)
    row = RawRow(line, dict(zip(header, fields, strict=True)))
    return _sized(row, sum(len(part.encode()) for part in fields), max_row_bytes)


def _read_parquet(path: Path, max_row_bytes: int) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256)
        number = 0
        for batch in batches:
            for index in range(batch.num_rows):
                number += 1
                try:
                    value = batch.slice(index, 1).to_pylist()[0]
                except UnicodeDecodeError:
                    yield RawRow(number, {}, NOT_UTF8)
                    continue
                yield _sized(RawRow(number, value), _text_bytes(value), max_row_bytes)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: is no readable Parquet file ({str(error).splitlines()[0]})") from error


def _text_bytes(value: Any) -> int:
    """UTF-8 bytes of all text in a row that has no text form of its own."""
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, dict):
        return sum(_text_bytes(part) for part in value.values())
    return sum(_text_bytes(part) for part in value) if isinstance(value, list) else 0
