"""What a source is asked and what it answers: a score, per-token rewards, or the reason why there is neither.

No torch here: an isolated function checks its answers in its own small process.
"""

import math
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

LARGEST_SCORE = 1e15
"""Losses square scores and add them up in float32, which ends at 3e38."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A response that a source could not score."""

    reason: str
    """In words, for the log and the error."""


Outcome: TypeAlias = float | list[float] | Failure
"""The score of a response, its per-token rewards (one per response token, the stop token included), or a failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """Responses to score, as plain data."""

    prompts: list[str]
    """The prompts as the actor reads them, templates included."""
    originals: list[Any]
    """The prompts as the data has them: strings, or messages."""
    responses: list[str]
    """The responses as text, without the stop token."""
    response_ids: list[list[int]]
    """Their token ids, the stop token included."""
    columns: dict[str, list[Any]]
    """The data's further columns."""

    def rows(self, start: int, stop: int) -> "ScoreRequest":
        """Some of the responses, in order."""
        return ScoreRequest(
            prompts=self.prompts[start:stop],
            originals=self.originals[start:stop],
            responses=self.responses[start:stop],
            response_ids=self.response_ids[start:stop],
            columns={name: column[start:stop] for name, column in self.columns.items()},
        )

    @property
    def lengths(self) -> list[int]:
        """Tokens of each response."""
        return [len(ids) for ids in self.response_ids]


ScoreCall: TypeAlias = Callable[[ScoreRequest], list[Outcome]]
"""Scores every response of a request; a failure is an outcome and never raised."""


def all_failed(reason: str, num_responses: int) -> list[Outcome]:
    """The same failure for every response of a call."""
    return [Failure(reason)] * num_responses


def check_returned(returned: Any, lengths: Sequence[int]) -> list[Outcome]:
    """What a function or service returned, as outcomes: one per response, each a finite number or a list of them."""
    if isinstance(returned, str | bytes | dict) or not hasattr(returned, "__iter__"):
        return all_failed(f"returned {reprlib.repr(returned)}, not a list of scores", len(lengths))
    values = list(returned)
    if len(values) != len(lengths):
        return all_failed(f"returned {len(values)} values for {len(lengths)} responses", len(lengths))
    return [check_value(value, length) for value, length in zip(values, lengths, strict=True)]


def check_value(value: Any, length: int) -> Outcome:
    """One response's score, or its per-token rewards, of which there must be `length`."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return check_number(value)
    if len(value) != length:
        return Failure(f"returned {len(value)} token rewards for {length} response tokens")
    rewards: list[float] = []
    for number in (check_number(entry) for entry in value):
        if isinstance(number, Failure):
            return number
        rewards.append(number)
    total = check_number(sum(rewards))
    return total if isinstance(total, Failure) else rewards


def check_number(value: Any) -> float | Failure:
    """A float that losses can work with, or what was there instead."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except Exception:  # whatever the value's own conversion raises
        return Failure(f"returned {reprlib.repr(value)}, not a number")
    if isinstance(value, str | bytes) or not abs(number) <= LARGEST_SCORE:
        return Failure(f"returned {reprlib.repr(value)}; a finite number of at most 1e15 is needed")
    return number


def score_in_parts(call: ScoreCall, request: ScoreRequest, batch_rows: int | None, *, max_failed: int) -> list[Outcome]:
    """The outcomes of a request, asked for in parts of `batch_rows` responses (None = all at once).

    A part that fails costs time (a timeout, retries), so once more than `max_failed` responses have failed the rest
    has failed too, without being asked for.
    """
    outcomes: list[Outcome] = []
    num_responses = len(request.responses)
    size = batch_rows or num_responses
    while len(outcomes) < num_responses:
        if len(list(failures(outcomes))) > max_failed:
            return outcomes + all_failed("was not asked any more", num_responses - len(outcomes))
        outcomes += call(request.rows(len(outcomes), len(outcomes) + size))
    return outcomes


def failures(outcomes: Sequence[Outcome]) -> Iterator[tuple[int, str]]:
    """(row, reason) of every response that could not be scored."""
    for row, outcome in enumerate(outcomes):
        if isinstance(outcome, Failure):
            yield row, outcome.reason
