"""Loading: what is used, what is counted, what stops a run, and where the message points."""

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from hydra_rlhf.config import DataConfig
from hydra_rlhf.data.sources import (
    Demonstration,
    PreferencePair,
    Prompt,
    load_demonstrations,
    load_pairs,
    load_prompts,
)
from hydra_rlhf.errors import ConfigError, DataError

ROWS = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}", "id": i} for i in range(4)]
PAIRS = [PreferencePair(f"p{i}", f"c{i}", f"r{i}", {"id": i}) for i in range(4)]
SKIP = DataConfig(on_bad_row="skip")


def jsonl(path, *rows):
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    return path


def as_text(pairs):
    return [PreferencePair(pair.prompt, pair.chosen, pair.rejected, {"id": str(pair.columns["id"])}) for pair in pairs]


def test_every_container_gives_the_same_pairs(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=2), "utf-8")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for path in sorted(tmp_path.iterdir()):
        rows = load_pairs(path)
        assert rows.rows == PAIRS, path.name
        assert (rows.source, rows.format, rows.rows_read, rows.dropped) == (str(path), "pairs", 4, {})
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    assert load_pairs(tmp_path / "a.csv").rows == load_pairs(tmp_path / "a.csv.gz").rows == as_text(PAIRS)


BAD = {
    "missing": {"prompt": "p", "chosen": "c"},
    "null": {"prompt": "p", "chosen": None, "rejected": "r"},
    "wrong type": {"prompt": "p", "chosen": "c", "rejected": 5},
    "empty": {"prompt": "p", "chosen": "c", "rejected": "  "},
    "bad UTF-8": b'{"prompt": "p", "chosen": "\xe9", "rejected": "r"}',
    "surrogate": {"prompt": "p", "chosen": "\ud83d", "rejected": "r"},
    "broken JSON": b'{"prompt": "p", "chosen": "c"',
    "10 MB": {"prompt": "p", "chosen": "c" * 10_000_000, "rejected": "r"},
    "no object": b'"text"',
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_stops_with_file_and_line_or_is_skipped_and_counted(tmp_path, kind):
    path = jsonl(tmp_path / "a.jsonl", ROWS[0], b"", BAD[kind], *ROWS[1:])
    with pytest.raises(DataError) as error:
        load_pairs(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert "data.on_bad_row=skip" in str(error.value)
    rows = load_pairs(path, SKIP)
    assert rows.rows == PAIRS, "what is left is as in the file without the bad row"
    assert rows.rows_read == 5
    assert [(bad.file, bad.line) for bad in rows.bad_rows] == [(str(path), 3)]
    assert str(rows.bad_rows[0].reason) in str(error.value)
    assert len(str(error.value)) < 1000


def test_the_first_of_several_bad_rows_is_named(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", BAD["null"], *ROWS, BAD["missing"], BAD["broken JSON"])
    with pytest.raises(DataError, match=r"a\.jsonl:1: field 'chosen' is null \(the first of 3 bad rows\)"):
        load_pairs(path)
    assert [bad.line for bad in load_pairs(path, SKIP).bad_rows] == [1, 6, 7]


def test_bad_rows_of_csv_and_parquet_say_where_they_are(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,chosen,rejected\np,"c\n\n",r\np,,r\n', "utf-8")
    with pytest.raises(DataError, match=r"a\.csv:5: field 'chosen' is empty"):
        load_pairs(path)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*ROWS, BAD["null"]]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 5: field 'chosen' is null"):
        load_pairs(tmp_path / "a.parquet")


def test_equal_sides_and_duplicates_are_counted_drops(tmp_path):
    equal = {"prompt": "p", "chosen": "same", "rejected": "same"}
    path = jsonl(tmp_path / "a.jsonl", ROWS[0], equal, ROWS[1], ROWS[0], {**ROWS[1], "id": 9}, equal)
    rows = load_pairs(path)
    assert rows.rows == PAIRS[:2]
    assert rows.dropped == {"equal_sides": 2, "duplicate": 2}
    assert rows.rows_read == 6


def test_max_rows_counts_usable_rows_and_reads_no_further(tmp_path):
    equal = {"prompt": "p", "chosen": "same", "rejected": "same"}
    path = jsonl(tmp_path / "a.jsonl", equal, ROWS[0], ROWS[0], ROWS[1], b"broken", ROWS[2])
    rows = load_pairs(path, DataConfig(max_rows=2))
    assert rows.rows == PAIRS[:2]
    assert (rows.rows_read, rows.dropped) == (4, {"equal_sides": 1, "duplicate": 1})
    ranked = jsonl(tmp_path / "b.jsonl", {"instruction": "i", "output": ["a", "b", "c"]})
    assert [pair.rejected for pair in load_pairs(ranked, DataConfig(max_rows=1)).rows] == ["b"]


def test_columns_are_mapped(tmp_path):
    theirs = [{"question": "p", "good": "c", "bad": "r", "chosen": "old"}]
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    rows = load_pairs(jsonl(tmp_path / "a.jsonl", *theirs), DataConfig(columns=columns))
    assert rows.rows == [PreferencePair("p", "c", "r")]
    swapped = load_pairs(
        jsonl(tmp_path / "b.jsonl", ROWS[0]), DataConfig(columns={"chosen": "rejected", "rejected": "chosen"})
    )
    assert swapped.rows == [PreferencePair("p0", "r0", "c0", {"id": 0})]
    assert load_pairs(jsonl(tmp_path / "c.jsonl", ROWS[0]), DataConfig(columns=columns)).rows == PAIRS[:1]
    path = jsonl(tmp_path / "d.jsonl", *theirs, {"question": "p", "good": "c"})
    with pytest.raises(
        DataError, match=r"d\.jsonl:2: field 'bad' \(data\.columns reads 'rejected' from it\) is missing"
    ):
        load_pairs(path, DataConfig(columns=columns))


def test_a_column_map_that_fits_nothing_is_refused(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"question": "p", "good": "c", "bad": "r"})
    with pytest.raises(ConfigError, match=r"data\.columns maps 'promt', which is no field .* did you mean 'prompt'"):
        load_pairs(path, DataConfig(columns={"promt": "question"}))
    with pytest.raises(ConfigError, match=r"reads 'prompt' from 'questoin', which no row has; did you mean 'question'"):
        load_pairs(path, DataConfig(columns={"prompt": "questoin"}))


def test_the_map_and_format_of_the_pairs_do_not_bind_the_data_beside_them(tmp_path):
    config = DataConfig(format="stack_exchange", columns={"question": "q", "response_j": "best"})
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "p", "response": "a"})
    assert load_demonstrations(path, config).rows == [Demonstration("p", "a")]
    assert load_prompts(path, config).rows == [Prompt("p", {"response": "a"})]


def test_a_format_can_be_named(tmp_path):
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "response_a": "a", "response_b": "b", "label": 1}
    path = jsonl(tmp_path / "a.jsonl", row)
    assert load_pairs(path).format == "pairs"
    named = load_pairs(path, DataConfig(format="labelled"))
    assert named.rows == [PreferencePair("p", "b", "a", {"chosen": "c", "rejected": "r"})]
    with pytest.raises(ConfigError, match="did you mean labelled"):
        load_pairs(path, DataConfig(format="labeled"))
    with pytest.raises(DataError, match=r"a\.jsonl:1: field 'info' is missing"):
        load_pairs(path, DataConfig(format="tldr_comparisons"))


def test_an_unknown_format_lists_the_fields_and_the_formats(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"x": 1, "y": 2})
    with pytest.raises(
        DataError, match=r"a\.jsonl: no known row format fits; its rows have the fields x, y\..*hh_rlhf"
    ):
        load_pairs(path)


def test_data_of_another_kind_is_sent_to_its_setting(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "p", "response": "a"})
    with pytest.raises(DataError, match=r"are demonstrations .* where pairs are needed; .* in data\.demonstrations"):
        load_pairs(path)
    pairs = jsonl(tmp_path / "b.jsonl", ROWS[0])
    with pytest.raises(DataError, match=r"are pairs .* where demonstrations are needed"):
        load_demonstrations(pairs)


def test_prompts_come_from_any_file_that_has_some(tmp_path):
    alone = jsonl(tmp_path / "a.jsonl", {"prompt": "p", "answer": 4}, {"prompt": "q"}, {"prompt": "p"})
    rows = load_prompts(alone)
    assert rows.rows == [Prompt("p", {"answer": 4}), Prompt("q")]
    assert (rows.dropped, rows.rows_read) == ({"duplicate": 1}, 3)
    ranked = jsonl(tmp_path / "b.jsonl", {"instruction": "i", "output": ["a", "b", "c"], "id": 1})
    rows = load_prompts(ranked)
    assert rows.rows == [Prompt("i", {"id": 1})]
    assert rows.dropped == {"repeated_prompt": 1}


def test_files_without_usable_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    with pytest.raises(DataError, match=r"a\.jsonl: holds no rows"):
        load_pairs(tmp_path / "a.jsonl")
    path = jsonl(tmp_path / "b.jsonl", b"{", b"[]")
    for config in (None, SKIP):
        with pytest.raises(DataError, match=r"b\.jsonl:1: broken JSON at column 2 .* \(2 bad rows\)"):
            load_pairs(path, config)
    equal = {"prompt": "p", "chosen": "same", "rejected": "same"}
    path = jsonl(tmp_path / "c.jsonl", equal, BAD["null"])
    with pytest.raises(DataError, match=r"none of its 2 rows can be used \(1 x equal_sides; 1 bad rows, first .*:2: "):
        load_pairs(path, SKIP)


def test_paths_that_hold_no_file(tmp_path):
    with pytest.raises(DataError, match="is a folder; name one file in it"):
        load_pairs(tmp_path)
    with pytest.raises(DataError, match=r"mine\.jsonl: there is no such file"):
        load_pairs("mine.jsonl")
    with pytest.raises(DataError, match=r"\./mine: there is no such file"):
        load_pairs("./mine")


def test_hub_data_sets(monkeypatch, tmp_path):
    import datasets

    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        return datasets.Dataset.from_list([{**row, "prompt": [{"role": "user", "content": "Hi"}]} for row in ROWS])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_pairs("someone/pairs", split="train_prefs")
    assert asked == [("someone/pairs", {"split": "train_prefs"})], "remote code is never allowed"
    assert [pair.prompt for pair in rows.rows] == [[{"role": "user", "content": "Hi"}]] * 4
    assert rows.source == "someone/pairs"
    with pytest.raises(DataError, match=r"someone/pairs, row 1: the row has \d+ bytes, more than data.max_row_bytes=8"):
        load_pairs("someone/pairs", DataConfig(max_row_bytes=8))


def test_a_name_that_is_neither_file_nor_reachable(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"someone/pairs: there is no such file, and .* hub dataset .* split 'train'"):
        load_pairs("someone/pairs")


def test_rows_keep_the_order_of_the_file(tmp_path):
    rows = [{"prompt": f"p{i * 7919 % 1000}", "chosen": "c", "rejected": "r"} for i in range(1000)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    assert [pair.prompt for pair in load_pairs(path).rows] == [row["prompt"] for row in rows]
