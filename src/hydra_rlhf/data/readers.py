"""What a row reader gives, and the readers of the plain row forms (pairs, labelled, demonstrations, prompts).

A reader gets one row (a dict) and returns its records and what it left out on purpose, as {reason: count}; RowError
says that the row is malformed. Ranked and scored lists give one pair for each reply that is worse than the best one:
the best against it. So `chosen` is always a best reply, and n replies give at most n - 1 pairs. Imports no torch.
"""

import math
import reprlib
from collections import Counter
from typing import Any, NamedTuple

from hydra_rlhf.data.rows import (
    Demonstration,
    Message,
    PreferencePair,
    Prompt,
    PromptValue,
    Record,
    RowError,
    check_messages,
    check_prompt,
    check_response,
    check_text,
    describe_type,
)

Row = dict[str, Any]


class Reading(NamedTuple):
    """What one row gives."""

    records: list[Record]
    """Usable records, all with the row's one prompt (trees: with the prompts of the row's one tree)."""
    dropped: dict[str, int]
    """What was left out on purpose, as {reason: count}."""


def required(row: Row, name: str) -> Any:
    """The field `name` of `row`; RowError if it is missing."""
    if name not in row:
        raise RowError(f"field '{name}' is missing")
    return row[name]


def required_list(row: Row, name: str) -> list[Any]:
    """The field `name` of `row` as a list; RowError if it is missing or something else."""
    value = required(row, name)
    if not isinstance(value, list):
        raise RowError(f"field '{name}' is {describe_type(value)}, not a list")
    return value


def pair_reading(prompt: PromptValue, chosen: str, rejected: str) -> Reading:
    """One pair, or none where the two sides are equal but for outer blanks."""
    if chosen.strip() == rejected.strip():
        return Reading([], {"equal_sides": 1})
    return Reading([PreferencePair(prompt, chosen, rejected)], {})


def best_against_others(prompt: PromptValue, replies: list[tuple[float, str]]) -> Reading:
    """Scored replies, higher is better -> the first best one against each worse one, in their order."""
    if len(replies) < 2:
        return Reading([], {"single_reply": 1})
    best_score, best = max(replies, key=lambda reply: reply[0])
    records: list[Record] = []
    dropped: Counter[str] = Counter()
    for score, reply in replies:
        if score < best_score:
            reading = pair_reading(prompt, best, reply)
            records += reading.records
            dropped.update(reading.dropped)
    num_ties = sum(score == best_score for score, _ in replies) - 1
    if num_ties:
        dropped["tie"] += num_ties
    return Reading(records, dict(dropped))


def check_score(value: Any, name: str) -> float:
    """`value` as a finite number; RowError naming the field otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        shown = value if isinstance(value, float) else describe_type(value)
        raise RowError(f"field '{name}' is {shown}, not a finite number")
    return float(value)


def check_only_response(value: Any, name: str) -> str:
    """A response that is text or one assistant message; RowError otherwise."""
    turns, text = check_response(value, name)
    if turns:
        raise RowError(f"field '{name}' holds {len(turns) + 1} messages; it must be text or one assistant message")
    return text


def read_pairs(row: Row) -> Reading:
    """prompt, chosen, rejected as text or messages; the prompt may be the common part of two conversations.

    Where there is both, the conversations may repeat the prompt or follow it.
    """
    chosen_turns, chosen = check_response(required(row, "chosen"), "chosen")
    rejected_turns, rejected = check_response(required(row, "rejected"), "rejected")
    if chosen_turns != rejected_turns:
        raise RowError("'chosen' and 'rejected' differ before their last message, so they answer different prompts")
    turns = chosen_turns
    if not turns:
        return pair_reading(check_prompt(required(row, "prompt")), chosen, rejected)
    if row.get("prompt") is not None:
        prompt = check_prompt(row["prompt"])
        opening: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        repeated = any(turns[start : start + len(opening)] == opening for start in range(len(turns)))
        turns = turns if repeated else opening + turns
    return pair_reading(check_prompt(turns), chosen, rejected)


def read_labelled(row: Row) -> Reading:
    """prompt, response_a, response_b and which of them is better: label 0 or a, 1 or b, or tie."""
    prompt = check_prompt(required(row, "prompt"))
    response_a = check_only_response(required(row, "response_a"), "response_a")
    response_b = check_only_response(required(row, "response_b"), "response_b")
    label = required(row, "label")
    if isinstance(label, bool) or not isinstance(label, int | float | str):
        raise RowError(f"field 'label' is {describe_type(label)}; it must be 0, 1, 'a', 'b' or 'tie'")
    match str(int(label) if isinstance(label, float) and label.is_integer() else label).strip().lower():
        case "0" | "a":
            return pair_reading(prompt, response_a, response_b)
        case "1" | "b":
            return pair_reading(prompt, response_b, response_a)
        case "tie":
            return Reading([], {"tie": 1})
    raise RowError(f"field 'label' is {reprlib.repr(label)}; it must be 0, 1, 'a', 'b' or 'tie'")


def instruction_prompt(row: Row) -> str:
    """`instruction`, and after a blank line `input` where there is one."""
    instruction = check_text(required(row, "instruction"), "instruction")
    given = row.get("input")
    if given is not None and not isinstance(given, str):
        raise RowError(f"field 'input' is {describe_type(given)}, not a string")
    return f"{instruction}\n\n{given}" if given and given.strip() else instruction


def read_instruction_pairs(row: Row) -> Reading:
    """instruction, input, chosen, rejected."""
    chosen = check_text(required(row, "chosen"), "chosen")
    return pair_reading(instruction_prompt(row), chosen, check_text(required(row, "rejected"), "rejected"))


def read_demonstration(row: Row) -> Reading:
    """prompt and response, as text or messages."""
    response = check_only_response(required(row, "response"), "response")
    return Reading([Demonstration(check_prompt(required(row, "prompt")), response)], {})


def read_conversation(row: Row) -> Reading:
    """messages: a conversation whose last turn, the assistant's, is the response."""
    turns, response = check_response(check_messages(required_list(row, "messages"), "messages"), "messages")
    return Reading([Demonstration(check_prompt(turns, "messages (before the response)"), response)], {})


def read_alpaca(row: Row) -> Reading:
    """instruction, input, output."""
    return Reading([Demonstration(instruction_prompt(row), check_text(required(row, "output"), "output"))], {})


def read_prompt(row: Row) -> Reading:
    """prompt alone."""
    return Reading([Prompt(check_prompt(required(row, "prompt")))], {})
