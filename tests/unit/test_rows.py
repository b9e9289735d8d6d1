"""Canonical prompts, splits that keep a prompt on one side, duplicates."""

import hashlib
import json

import pytest

from hydra_rlhf.data.rows import (
    BadRow,
    Demonstration,
    PreferencePair,
    Prompt,
    Rows,
    drop_duplicates,
    opening_key,
    prompt_key,
    record_key,
    split_by_prompt,
    without_prompts_of,
)
from hydra_rlhf.errors import DataError


def pairs_of(prompts):
    return Rows(
        rows=[PreferencePair(prompt, f"good {i}", f"bad {i}") for i, prompt in enumerate(prompts)],
        source="made.jsonl",
        format="pairs",
        rows_read=len(prompts),
    )


def conversation(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]


def test_a_prompt_has_one_key_in_every_form():
    # Written out: sha256 of the JSON list of [role, content] lists.
    expected = hashlib.sha256(b'[["user", "Hi"]]').hexdigest()
    assert prompt_key("Hi") == expected
    assert prompt_key(" Hi\n") == expected
    assert prompt_key([{"role": "user", "content": "Hi"}]) == expected
    assert prompt_key([{"role": "user", "content": "Hi\n"}]) == expected
    assert prompt_key([{"role": "system", "content": "Hi"}]) != expected
    assert prompt_key("hi") != expected
    assert json.dumps("é") == '"\\u00e9"'  # non-ASCII text goes into the hash in this form
    assert prompt_key("é") == hashlib.sha256(b'[["user", "\\u00e9"]]').hexdigest()


def test_the_split_is_the_hash_and_nothing_else():
    prompts = [f"prompt {number}" for number in range(400)]
    train, test = split_by_prompt(pairs_of(prompts), 0.25)
    # The first eight bytes of the hash, over 2^64, below a quarter: the first byte is below 64.
    held_out = {p for p in prompts if bytes.fromhex(prompt_key(p))[0] < 64}
    assert {row.prompt for row in test.rows} == held_out
    assert {row.prompt for row in train.rows} == set(prompts) - held_out
    assert 60 < len(test) < 140
    backwards = split_by_prompt(pairs_of(prompts[::-1]), 0.25)[1]
    assert {row.prompt for row in backwards.rows} == held_out
    assert [row.prompt for row in test.rows] == [p for p in prompts if p in held_out], "file order is kept"


def test_each_side_accounts_for_the_other():
    rows = pairs_of([f"prompt {number}" for number in range(100)])
    train, test = split_by_prompt(rows, 0.3)
    assert train.dropped == {"held_out_for_test": len(test)}
    assert test.dropped == {"kept_for_training": len(train)}
    assert train.rows_read == test.rows_read == 100 == len(train) + len(test)
    assert rows.dropped == {}, "the rows that were split are left as they were"


def test_one_prompt_and_one_conversation_stay_on_one_side():
    rows = pairs_of([f"prompt {number % 50}" for number in range(200)])
    train, test = split_by_prompt(rows, 0.5)
    assert not {row.prompt for row in train.rows} & {row.prompt for row in test.rows}
    for number in range(50):
        opening, later = conversation(f"q {number}"), conversation(f"q {number}", "a", "and then?")
        assert opening_key(opening) == opening_key(later) != prompt_key(later)
        both = split_by_prompt(pairs_of([opening, later, *(f"x {i}" for i in range(40))]), 0.5)
        sides = [side for side, part in enumerate(both) for row in part.rows if isinstance(row.prompt, list)]
        assert len(sides) == 2
        assert sides[0] == sides[1]


def test_a_split_with_an_empty_side_is_refused():
    with pytest.raises(DataError, match=r"data\.test_frac=0\.1 leaves no .* of made\.jsonl, which has 1 different"):
        split_by_prompt(pairs_of(["one", "one"]), 0.1)
    train, test = split_by_prompt(pairs_of(["one", "two"]), 0.0)
    assert (len(train), len(test)) == (2, 0)


def test_prompts_of_the_test_set_leave_the_training_set():
    train = without_prompts_of(pairs_of(["a", "b", "c", "b "]), pairs_of([conversation("b"), "d"]))
    assert [row.prompt for row in train.rows] == ["a", "c"]
    assert train.dropped == {"prompt_also_in_test": 2}


def test_duplicates_are_equal_in_all_that_is_trained_on():
    first = PreferencePair("p", "good", "bad", {"id": 1})
    same = PreferencePair("p", "good", "bad", {"id": 2})
    swapped = PreferencePair("p", "bad", "good")
    seen: set[str] = set()
    assert drop_duplicates([first, same, swapped], seen) == [first, swapped]
    assert drop_duplicates([same], seen) == []
    keys = {record_key(Prompt("p")), record_key(Demonstration("p", "good")), record_key(first), record_key(swapped)}
    assert len(keys) == 4


def test_different_prompts_keep_the_columns_of_their_first_row():
    rows = Rows(
        rows=[PreferencePair("a", "x", "y", {"id": 1}), PreferencePair("b", "x", "y"), PreferencePair("a", "z", "y")],
        source="made.jsonl",
        format="pairs",
        rows_read=3,
    )
    assert rows.prompts == [Prompt("a", {"id": 1}), Prompt("b")]
    assert len(rows) == 3


def test_a_bad_row_says_where_it_is():
    assert str(BadRow("a.csv", 7, "is broken")) == "a.csv:7: is broken"
    assert str(BadRow("a.parquet", 7, "is broken", "row")) == "a.parquet, row 7: is broken"
