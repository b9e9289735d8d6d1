"""Raw rows of every container, with the lines they start on, and what a damaged file does."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from hydra_rlhf.data import files
from hydra_rlhf.data.files import read_file
from hydra_rlhf.errors import DataError

LIMIT = 1_000_000


def read(path: Path, limit: int = LIMIT):
    return list(read_file(path, limit))


def lines_and_problems(path: Path, limit: int = LIMIT):
    return [(row.line, row.problem) for row in read(path, limit)]


def written(path: Path, content: bytes | str) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_json_lines_count_blank_lines_and_pass_over_them(tmp_path):
    path = written(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\n\n  \r\n{"a": 2}\r\n{"a": "\xc3\xa9"}')
    assert [(row.line, row.value) for row in read(path)] == [(1, {"a": 1}), (4, {"a": 2}), (5, {"a": "é"})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "broken JSON at column 8"),
        (b'{"a": "\xff"}', "not valid UTF-8; save the file as UTF-8 (byte 8 of the line)"),
        (b"[1, 2]", "a row must be an object with named fields, this is list"),
        (b'{"a": ["x\\ud83d"]}', "half of a surrogate pair"),
        (b'{"\\ude00": 1}', "half of a surrogate pair"),
        pytest.param(b"[" * 100_000, "cannot be read", id="bottomless"),
        pytest.param(b'{"a": ' + b"[" * 600 + b'"\\u00e9"' + b"]" * 600 + b"}", "nested too deeply", id="deep"),
        pytest.param(b'{"a": ' + b"1" * 5000 + b"}", "cannot be read", id="a number of 5000 digits"),
    ],
)
def test_one_broken_line_is_one_bad_row(tmp_path, line, reason):
    path = written(tmp_path / "a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": "\\ud83d\\ude00"}\n')
    first, bad, last = read(path)
    assert (first.problem, last.problem) == (None, None)
    assert last.value == {"a": "😀"}
    assert bad.line == 2
    assert reason in str(bad.problem)


def test_a_row_of_ten_megabytes_is_one_bad_row_in_every_container(tmp_path):
    rows = [{"a": "x"}, {"a": "y" * 10_000_000}, {"a": "z"}]
    as_lines = "\n".join(map(json.dumps, rows))
    written(tmp_path / "a.jsonl", as_lines)
    written(tmp_path / "a.jsonl.gz", as_lines)
    written(tmp_path / "a.json", json.dumps(rows))
    written(tmp_path / "a.csv", "\n".join(["a", *(row["a"] for row in rows)]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in sorted(tmp_path.iterdir()):
        first, bad, last = read(path)
        assert (first.value, last.value) == ({"a": "x"}, {"a": "z"}), path.name
        assert bad.value == {}
        assert "more than data.max_row_bytes=1000000" in str(bad.problem), path.name


def test_a_row_just_at_the_limit_is_read(tmp_path):
    # {"a": "xxxx"} has 13 bytes; a line break does not count.
    path = written(tmp_path / "a.jsonl", '{"a": "xxxx"}\r\n{"a": "xxxxx"}\n{"a": "é"}\n')
    assert lines_and_problems(path, 13) == [
        (1, None),
        (2, "the row has 15 bytes, more than data.max_row_bytes=13"),
        (3, None),
    ]


def test_json_arrays_name_the_line_of_each_element(tmp_path):
    text = '\ufeff\n[\n  {"a": 1}, {"a": 2},\n  {\n    "a": "]"\n  },\n  3,\n  {"a": "x\\udc80"}\n]\n\n'
    path = written(tmp_path / "a.json", text)
    rows = read(path)
    assert [row.line for row in rows] == [3, 3, 4, 7, 8]
    assert [row.value for row in rows] == [{"a": 1}, {"a": 2}, {"a": "]"}, {}, {}]
    assert "a row must be an object" in str(rows[3].problem)
    assert "surrogate" in str(rows[4].problem)
    assert read(written(tmp_path / "b.json", " [ ] ")) == []


def test_bad_bytes_in_an_array_cost_one_element(tmp_path):
    path = written(tmp_path / "a.json.gz", b'[{"a": "\xff"},\n{"a": "ok"}]')
    bad, good = read(path)
    assert bad.problem == files.NOT_UTF8
    assert (good.line, good.value) == (2, {"a": "ok"})


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[\n{"a": 1},\n{"a": }\n]', r"a\.json:3: broken JSON at column 7 \(Expecting value\)"),
        ('[{"a": 1}\n{"a": 2}]', r"a\.json:2: broken JSON at column 1 \(',' or ']' expected\)"),
        ('[{"a": 1},\n', r"a\.json:2: broken JSON at column 1"),
        ('[{"a": 1}]\n[]', r"a\.json:2: broken JSON at column 1 \(something follows the array\)"),
        pytest.param("[" * 100_000, r"a\.json:1: broken JSON", id="bottomless"),
    ],
)
def test_a_broken_array_is_an_error_with_its_position(tmp_path, text, place):
    with pytest.raises(DataError, match=place):
        read(written(tmp_path / "a.json", text))


def test_a_json_file_may_hold_one_object_a_line(tmp_path):
    path = written(tmp_path / "batch3.json", '{"a": 1}\n{"a": 2}\n')
    assert [(row.line, row.value) for row in read(path)] == [(1, {"a": 1}), (2, {"a": 2})]


def test_csv_rows_start_where_their_quotes_open(tmp_path):
    text = '\ufeffid,text\r\n1,"two\nlines, ""quoted"""\r\n\r\n2,é\n3,"a\n\n\nb"\n4,last'
    for name in ("a.csv", "a.csv.gz"):
        rows = read(written(tmp_path / name, text))
        assert [(row.line, row.value) for row in rows] == [
            (2, {"id": "1", "text": 'two\nlines, "quoted"'}),
            (5, {"id": "2", "text": "é"}),
            (6, {"id": "3", "text": "a\n\n\nb"}),
            (10, {"id": "4", "text": "last"}),
        ]


def test_bad_csv_rows(tmp_path):
    content = b'id,text\n1,ok\n2\n3,a,b\n4,\xff\n5,"x"y\n6,ok\n7,"never closed\n8,lost\n'
    rows = read(written(tmp_path / "a.csv", content))
    assert [(row.line, row.problem) for row in rows] == [
        (2, None),
        (3, "has 1 fields, the header has 2"),
        (4, "has 3 fields, the header has 2"),
        (5, files.NOT_UTF8),
        (6, "broken CSV (',' expected after '\"')"),
        (7, None),
        (8, "a quoted field is never closed"),
    ]


def test_a_csv_header_must_be_readable(tmp_path):
    with pytest.raises(DataError, match=r"a\.csv:1: the header names text more than once"):
        read(written(tmp_path / "a.csv", "text,id,text\nx,1,y\n"))
    with pytest.raises(DataError, match=r"b\.csv:1: the header is not valid UTF-8"):
        read(written(tmp_path / "b.csv", b"t\xffxt,id\nx,1\n"))


def test_parquet_rows_are_numbered(tmp_path):
    message = [{"role": "user", "content": "é"}]
    table = pyarrow.Table.from_pylist([{"a": message, "n": 1}, {"a": None, "n": 2}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    assert [(row.line, row.value) for row in rows] == [(1, {"a": message, "n": 1}), (2, {"a": None, "n": 2})]
    # Text that is not UTF-8 gets into Parquet through binary columns that are declared to be text.
    raw = pyarrow.array([b"ok", b"\xff", b"fine"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"a": raw}), tmp_path / "b.parquet")
    assert lines_and_problems(tmp_path / "b.parquet") == [(1, None), (2, files.NOT_UTF8), (3, None)]


def test_damaged_and_unknown_files_are_named(tmp_path):
    archive = written(tmp_path / "a.jsonl.gz", '{"a": "' + "xyz" * 5000 + '"}\n')
    archive.write_bytes(archive.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: the gzip archive is damaged"):
        read(archive)
    plain = tmp_path / "b.csv.gz"
    plain.write_text("a\n1\n")
    with pytest.raises(DataError, match=r"b\.csv\.gz: the gzip archive is damaged"):
        read(plain)
    with pytest.raises(DataError, match=r"c\.parquet: is no readable Parquet file"):
        read(written(tmp_path / "c.parquet", "no parquet"))
    with pytest.raises(DataError, match=r"d\.tsv: unknown kind of file; it must end in one of \.jsonl"):
        read(written(tmp_path / "d.tsv", "a\tb"))
