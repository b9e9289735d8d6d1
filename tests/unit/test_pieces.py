"""Pieces of a decoded text: they join to it, whatever bytes a token ends in, whatever happens to spaces."""

from itertools import pairwise

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


def from_the_start(ids) -> list[str]:
    """The pieces by decoding everything up to each token, however long that takes."""
    text = decode(ids)
    ends = [0, *(pieces.shared_length(decode(ids[:count]), text) for count in range(1, len(ids))), len(text)]
    return [text[start:end] for start, end in pairwise(ends)]


def test_long_texts_are_cut_as_from_their_start() -> None:
    # Tokens 64 and 128, where blocks begin, fall into words here, and into an octopus there.
    plain = encode("What time do you close? At six. " * 40)
    odd = encode("🐙" * 60)
    assert min(len(plain), len(odd)) > 128
    assert cut(plain) == from_the_start(plain)
    assert cut(odd[:-1]) == from_the_start(odd[:-1])
    shifted = [*encode("a"), *odd]
    assert cut(shifted) == from_the_start(shifted)


def test_long_texts_of_a_decoder_that_takes_a_space_off() -> None:
    def stripped(ids) -> str:
        return "".join(f" w{i}" for i in ids).removeprefix(" ")

    looked: list[int] = []

    def counted(ids) -> str:
        looked.append(len(ids))
        return stripped(ids)

    ids = list(range(200))
    assert pieces.text_pieces(ids, stripped(ids), counted) == ["w0", *(f" w{i}" for i in ids[1:])]
    # Four blocks: no token but those at a block's ends is decoded with more than the block and its context.
    assert sum(length > 64 + 8 for length in looked) <= 2 * 4


def test_a_context_that_reads_differently_is_not_trusted() -> None:
    # Everything from the hundredth token on is in two capitals, but only where the first token is there to say so.
    def shouting(ids) -> str:
        return "".join("XX" if ids[0] == 0 and i > 99 else "x" for i in ids)

    ids = list(range(130))
    assert pieces.text_pieces(ids, shouting(ids), shouting) == ["x"] * 100 + ["XX"] * 30


def test_a_decoder_that_changes_its_mind_says_nothing_twice() -> None:
    said = {0: "", 1: "ab", 2: "abc", 3: "x", 4: "abcd"}
    assert pieces.text_pieces([0, 1, 2, 3], "abcd", lambda ids: said[len(ids)]) == ["ab", "c", "", "d"]


def test_what_no_token_says_belongs_to_the_last() -> None:
    assert pieces.text_pieces([0, 1], "abc", lambda ids: "ab"[: len(ids)]) == ["a", "bc"]


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
