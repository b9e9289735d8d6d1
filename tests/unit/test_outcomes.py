"""What a function or service may return, and what becomes of everything else."""

import math

import pytest

from hydra_rlhf.stages.scoring import outcomes

LARGEST = 1e15


def request(num=3):
    return outcomes.ScoreRequest(
        prompts=[f"p{i}" for i in range(num)],
        originals=[f"p{i}" for i in range(num)],
        responses=[f"r{i}" for i in range(num)],
        response_ids=[list(range(i + 1)) for i in range(num)],
        columns={"source": [10 * i for i in range(num)]},
    )


class OnlyFloat:
    """A number that is no float, as those of other libraries."""

    def __float__(self):
        return 2.5


class Raises:
    """A number whose conversion fails in its own way."""

    def __float__(self):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1.5, 1.5), (-3, -3.0), (True, 1.0), (OnlyFloat(), 2.5), (LARGEST, LARGEST), (-LARGEST, -LARGEST)],
)
def test_numbers(value, expected):
    assert outcomes.check_returned([value], [4]) == [expected]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (math.nan, "returned nan; a finite number of at most 1e15 is needed"),
        (-math.inf, "returned -inf; a finite number of at most 1e15 is needed"),
        (1e39, "returned 1e+39; a finite number of at most 1e15 is needed"),
        (10**400, "; a finite number of at most 1e15 is needed"),
        ("1.0", "returned '1.0'; a finite number of at most 1e15 is needed"),
        (b"1.0", "returned b'1.0'; a finite number of at most 1e15 is needed"),
        (None, "returned None, not a number"),
        ({}, "returned {}, not a number"),
        (Raises(), "not a number"),
        ([1.0, 2.0], "returned 2 token rewards for 3 response tokens"),
        ([1.0] * 4, "returned 4 token rewards for 3 response tokens"),
        ([1.0, math.nan, 2.0], "returned nan; a finite number of at most 1e15 is needed"),
        ([9e14, 9e14, 0.0], "returned 1800000000000000.0; a finite number of at most 1e15 is needed"),
        ([[1.0], 0.0, 0.0], "returned [1.0], not a number"),
    ],
)
def test_a_bad_value_fails_its_own_row_only(value, reason):
    before, bad, after = outcomes.check_returned([0.5, value, [1, 2]], [1, 3, 2])
    assert (before, after) == (0.5, [1.0, 2.0])
    assert isinstance(bad, outcomes.Failure)
    assert bad.reason.endswith(reason)


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (None, "returned None, not a list of scores"),
        (3.0, "returned 3.0, not a list of scores"),
        ("abc", "returned 'abc', not a list of scores"),
        ({"a": 1, "b": 2, "c": 3}, "not a list of scores"),
        ([1.0, 2.0], "returned 2 values for 3 responses"),
        ([1.0] * 4, "returned 4 values for 3 responses"),
        ([], "returned 0 values for 3 responses"),
    ],
)
def test_a_bad_list_fails_every_row(returned, reason):
    found = outcomes.check_returned(returned, [1, 1, 1])
    assert len(found) == 3
    assert all(isinstance(outcome, outcomes.Failure) and outcome.reason.endswith(reason) for outcome in found)


def test_a_generator_is_read():
    assert outcomes.check_returned((x for x in (1, 2)), [1, 1]) == [1.0, 2.0]


def test_rows_of_a_request():
    part = request().rows(1, 3)
    assert part.prompts == part.originals == ["p1", "p2"]
    assert part.responses == ["r1", "r2"]
    assert part.response_ids == [[0, 1], [0, 1, 2]]
    assert part.lengths == [2, 3]
    assert part.columns == {"source": [10, 20]}


@pytest.mark.parametrize(
    ("batch_rows", "asked"),
    [
        (None, [["r0", "r1", "r2"]]),
        (1, [["r0"], ["r1"], ["r2"]]),
        (2, [["r0", "r1"], ["r2"]]),
        (5, [["r0", "r1", "r2"]]),
    ],
)
def test_requests_are_asked_for_in_parts(batch_rows, asked):
    seen = []

    def call(part):
        seen.append(part.responses)
        return [float(text[1:]) for text in part.responses]

    assert outcomes.score_in_parts(call, request(), batch_rows, max_failed=0) == [0.0, 1.0, 2.0]
    assert seen == asked


@pytest.mark.parametrize(("max_failed", "num_calls"), [(0, 2), (1, 3), (2, 5), (9, 5)])
def test_after_too_many_failures_nothing_more_is_asked_for(max_failed, num_calls):
    """Rows 1, 2 and 4 of five fail."""
    calls = []

    def call(part):
        (row,) = part.columns["source"]
        calls.append(row)
        return [outcomes.Failure("hangs") if row in (10, 20, 40) else 1.0]

    found = outcomes.score_in_parts(call, request(5), 1, max_failed=max_failed)
    assert len(calls) == num_calls
    assert len(found) == 5
    reasons = dict(outcomes.failures(found))
    assert reasons[1] == "hangs"
    assert set(reasons) == {1, 2, 4} | set(range(num_calls, 5))
    assert all(reasons[row] == "was not asked any more" for row in range(num_calls, 5))
