"""Stop strings are found where they end, whatever tokens they are cut into."""

import pytest

from hydra_rlhf.model import stop_strings

PIECES = ["", "a", "b", "ab", "END", "N", "D", "E", " ", "é".encode().decode("latin-1")]
"""What each id stands for; id 0 is a token without text."""


def decode(ids):
    """Pieces, one after the other."""
    return "".join(PIECES[i] for i in ids)


def stops(*strings):
    return stop_strings.StopStrings(strings, decode)


@pytest.mark.parametrize(
    ("ids", "known", "end"),
    [
        ([1, 2, 4, 1], 0, 3),  # a b END
        ([1, 7, 5, 6, 1], 0, 4),  # a E N D
        ([7, 5, 6], 2, 3),  # begins in what is known
        ([4, 4], 1, 2),  # the second, where the first is known not to count
        ([7, 5], 0, None),
        ([1, 2, 3, 1, 2], 0, None),
        ([7, 0, 5, 0, 6], 0, 5),  # tokens without text in between
        ([], 0, None),
        ([4], 1, None),  # nothing new
    ],
)
def test_the_token_that_completes_a_string_ends_the_response(ids, known, end):
    assert stops("END").first_end(ids, known) == end


def test_the_first_of_several_strings_counts():
    both = stops("END", "ba")
    assert both.first_end([2, 1, 4], 0) == 2
    assert both.cut("ab END and baEND") == "ab "
    assert both.cut("aENDba") == "a"
    assert both.cut("nothing") == "nothing"
    assert both.cut("END") == ""


def test_a_response_has_its_least_number_of_tokens():
    """What the text has by then ends it there, however long ago it came."""
    ids = [4, *[1] * 30, 2]
    assert stops("END").first_end(ids, 0, least=20) == 20
    assert stops("END").first_end(ids, 20, least=20) is None
    assert stops("ab").first_end(ids, 0, least=20) == 32


def test_the_longest_string_says_how_far_to_look_back():
    letters = [7, 5, 6, 7, 5, 6, 7, 5, 6]
    assert stops("ENDENDEND", "ab").first_end(letters, 8) == 9


def test_long_responses_are_read_from_near_their_end():
    seen = []

    def watched(ids):
        seen.append(len(ids))
        return decode(ids)

    assert stop_strings.StopStrings(("END",), watched).first_end([1] * 500, 498) is None
    assert seen == [6, 6]
