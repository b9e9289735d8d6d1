"""Pieces of a decoded text: they join to it, whatever bytes a token ends in, whatever happens to spaces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_rlhf.data import pieces
from hydra_rlhf.data.scratch_tokenizer import scratch_tokenizer

TOKENIZER = scratch_tokenizer(["What time do you close? At six."] * 2, 320)
EOS = 2


def decode(ids) -> str:
    """What a response of these ids reads, special tokens left out."""
    return TOKENIZER.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def encode(text: str) -> list[int]:
    """Ids of plain text."""
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def cut(ids) -> list[str]:
    """The pieces of what some ids decode to."""
    return pieces.text_pieces(ids, decode(ids), decode)


def test_a_character_of_several_tokens_belongs_to_the_last_of_them() -> None:
    # The octopus is four bytes, none of which the tokenizer has merged; "ü" is two.
    ids = encode("ü🐙!")
    assert len(ids) == 7
    assert cut(ids) == ["", "ü", "", "", "", "🐙", "!"]


def test_bytes_that_never_become_a_character_are_shown_where_the_text_has_them() -> None:
    # Three of the octopus's bytes decode to one replacement character, and then an "a".
    ids = [*encode("🐙")[:3], *encode("a")]
    found = cut(ids)
    assert decode(ids) == "\N{REPLACEMENT CHARACTER}a"
    assert "".join(found) == decode(ids)
    assert found[-1] == "a"


def test_special_tokens_have_empty_pieces() -> None:
    ids = [*encode("At six."), EOS]
    assert cut(ids)[-1] == ""
    assert "".join(cut(ids)) == "At six."
    assert cut([EOS]) == [""]
    assert cut([]) == []


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=24))
def test_pieces_of_any_ids_join_to_their_text(ids: list[int]) -> None:
    found = cut(ids)
    assert len(found) == len(ids)
    assert "".join(found) == decode(ids)


@given(st.text(max_size=30))
def test_pieces_of_any_text_join_to_it(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    assert "".join(cut(encode(text))) == text


def test_a_decoder_that_takes_back_what_it_said_loses_nothing() -> None:
    # Clean-up: a space before a full stop is there until the full stop comes.
    words = ["a", " ", ".", "b"]

    def clean(ids) -> str:
        return "".join(words[i] for i in ids).replace(" .", ".")

    assert pieces.text_pieces([0, 1, 2, 3], clean([0, 1, 2, 3]), clean) == ["a", "", ".", "b"]


def test_a_decoder_that_changes_its_mind_says_nothing_twice() -> None:
    said = {1: "ab", 2: "abc", 3: "x", 4: "abcd"}
    assert pieces.text_pieces([0, 1, 2, 3], "abcd", lambda ids: said[len(ids)]) == ["ab", "c", "", "d"]


def test_the_space_that_a_response_loses_at_its_front_is_no_piece() -> None:
    def stripped(ids) -> str:
        return "".join(f" w{i}" for i in ids).removeprefix(" ")

    assert pieces.text_pieces([1, 2], stripped([1, 2]), stripped) == ["w1", " w2"]


@pytest.mark.parametrize(
    ("begun", "text", "length"),
    [
        ("ab", "abc", 2),
        ("ab\N{REPLACEMENT CHARACTER}", "abü", 2),
        ("ab\N{REPLACEMENT CHARACTER}", "ab\N{REPLACEMENT CHARACTER}c", 3),
        ("ax", "abc", 1),
        ("abc", "ab", 2),
        ("", "ab", 0),
    ],
)
def test_shared_length(begun: str, text: str, length: int) -> None:
    assert pieces.shared_length(begun, text) == length
