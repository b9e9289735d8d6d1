"""The records every source ends in, what makes a row bad, and splits that keep a prompt on one side. No torch."""

import hashlib
import json
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypedDict, TypeVar

from hydra_rlhf.errors import DataError

ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str
    """The turn's text."""


PromptValue = str | list[Message]


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One prompt with a better and a worse response."""

    prompt: PromptValue
    """Text, or messages whose last one is not the assistant's."""
    chosen: str
    """The better response."""
    rejected: str
    """The worse response."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The row's further fields."""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One prompt with a response to imitate."""

    prompt: PromptValue
    """Text, or messages whose last one is not the assistant's."""
    response: str
    """The response to imitate."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The row's further fields."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt to respond to."""

    prompt: PromptValue
    """Text, or messages whose last one is not the assistant's."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The row's further fields; reward functions get them."""


Record = PreferencePair | Demonstration | Prompt
RecordT = TypeVar("RecordT", PreferencePair, Demonstration, Prompt)


class RowError(Exception):
    """A row cannot be used; the message is the reason. The reader of the file adds the file and the line."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A malformed row, where it is and why it cannot be used."""

    file: str
    """Path or hub name."""
    line: int
    """First line of the row, counted from 1; the row's number where the container has no lines (`unit`)."""
    reason: str
    """What is wrong."""
    unit: str = "line"
    """`line` for text files, `row` for Parquet and hub datasets."""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.unit == "line" else f"{self.file}, row {self.line}"
        return f"{place}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows(Generic[RecordT]):
    """A loaded data set: the usable records in file order, and an account of everything else."""

    rows: list[RecordT]
    """Usable records. One row of a ranked or scored format may give several."""
    source: str
    """Path or hub name."""
    format: str
    """Name of the row format that read it."""
    rows_read: int
    """Rows of the container that were looked at, good and bad."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Left out on purpose, as {reason: count}; malformed rows are in `bad_rows` instead."""
    bad_rows: list[BadRow] = field(default_factory=list)
    """Malformed rows, skipped because of `on_bad_row=skip`."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def prompts(self) -> list[Prompt]:
        """The different prompts in order of first appearance, each with the columns of its first row."""
        first: dict[str, Prompt] = {}
        for row in self.rows:
            first.setdefault(prompt_key(row.prompt), Prompt(row.prompt, row.columns))
        return list(first.values())


def check_text(value: Any, name: str) -> str:
    """`value` if it is a string with something in it; RowError naming the field `name` otherwise."""
    if value is None:
        raise RowError(f"field '{name}' is null")
    if not isinstance(value, str):
        raise RowError(f"field '{name}' is {describe_type(value)}, not a string")
    if not value.strip():
        raise RowError(f"field '{name}' is empty")
    return value


def check_messages(value: list[Any], name: str) -> list[Message]:
    """`value` as messages with exactly role and content; RowError naming the field and the message otherwise."""
    if not value:
        raise RowError(f"field '{name}' is an empty list of messages")
    messages: list[Message] = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise RowError(f"message {number} of '{name}' is not an object with 'role' and 'content'")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise RowError(
                f"message {number} of '{name}' has role {reprlib.repr(role)}; known roles: {', '.join(ROLES)}"
            )
        if not isinstance(content, str):
            raise RowError(f"message {number} of '{name}' has content that is {describe_type(content)}, not a string")
        messages.append({"role": role, "content": content})
    return messages


def check_prompt(value: Any, name: str = "prompt") -> PromptValue:
    """A prompt as text or messages; RowError if it is blank, or if its last message is the assistant's."""
    if not isinstance(value, list):
        return check_text(value, name)
    messages = check_messages(value, name)
    if messages[-1]["role"] == "assistant":
        raise RowError(f"field '{name}' ends with an assistant message; that one belongs to the response")
    if not any(message["content"].strip() for message in messages):
        raise RowError(f"field '{name}' is empty")
    return messages


def check_response(value: Any, name: str) -> tuple[list[Message], str]:
    """A response as (turns before it, text): a string, or a conversation that ends with an assistant message."""
    if not isinstance(value, list):
        return [], check_text(value, name)
    messages = check_messages(value, name)
    if messages[-1]["role"] != "assistant":
        raise RowError(f"field '{name}' ends with a {messages[-1]['role']} message, not with the assistant's")
    return messages[:-1], check_text(messages[-1]["content"], name)


def describe_type(value: Any) -> str:
    """JSON's word for the type of `value`, with an article."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def prompt_key(prompt: PromptValue) -> str:
    """sha256 of the prompt in one canonical form: a string equals one user message, and outer blanks do not count."""
    return _digest(_canonical(prompt))


def opening_key(prompt: PromptValue) -> str:
    """sha256 of the prompt up to its first user message, the same for all prompts cut from one conversation."""
    messages = _canonical(prompt)
    first_user = next((index for index, (role, _) in enumerate(messages) if role == "user"), len(messages))
    return _digest(messages[: first_user + 1])


def record_key(record: Record) -> str:
    """sha256 of what is trained on (columns do not count); equal records are duplicates."""
    texts: list[str] = []
    if isinstance(record, PreferencePair):
        texts = [record.chosen, record.rejected]
    elif isinstance(record, Demonstration):
        texts = [record.response]
    return _digest([prompt_key(record.prompt), *texts])


def split_by_prompt(rows: Rows[RecordT], test_frac: float) -> tuple[Rows[RecordT], Rows[RecordT]]:
    """(train, test): a row is held out if the hash of its prompt's opening (a number in [0, 1)) is below `test_frac`.

    So a prompt is never on both sides, nor are two turns of one conversation, and neither the order of rows nor rows
    added later move any. Each side counts the other's rows as dropped (`held_out_for_test`, `kept_for_training`).
    DataError if a side would be empty.
    """
    train: list[RecordT] = []
    test: list[RecordT] = []
    for row in rows.rows:
        position = int(opening_key(row.prompt)[:16], 16) / 2**64
        (test if position < test_frac else train).append(row)
    if test_frac > 0 and not (train and test):
        raise DataError(
            f"data.test_frac={test_frac} leaves no {'test' if train else 'training'} rows of {rows.source}, which has "
            f"{len(rows.prompts)} different prompts; name a held-out file in data.test or change data.test_frac"
        )
    return (
        replace(rows, rows=train, dropped=_count_more(rows.dropped, "held_out_for_test", len(test))),
        replace(rows, rows=test, dropped=_count_more(rows.dropped, "kept_for_training", len(train))),
    )


def without_prompts_of(train: Rows[RecordT], test: Rows[Any]) -> Rows[RecordT]:
    """`train` without the rows whose prompt is also in `test`, counted as `prompt_also_in_test`."""
    held_out = {prompt_key(row.prompt) for row in test.rows}
    kept = [row for row in train.rows if prompt_key(row.prompt) not in held_out]
    lost = len(train.rows) - len(kept)
    return replace(train, rows=kept, dropped=_count_more(train.dropped, "prompt_also_in_test", lost))


def drop_duplicates(records: Iterable[Record], seen: set[str]) -> list[Record]:
    """`records` without those whose key is in `seen`, in order; adds the new keys to `seen`."""
    kept: list[Record] = []
    for record in records:
        key = record_key(record)
        if key not in seen:
            seen.add(key)
            kept.append(record)
    return kept


def _count_more(dropped: dict[str, int], reason: str, count: int) -> dict[str, int]:
    return {**dropped, reason: dropped.get(reason, 0) + count} if count else dict(dropped)


def _canonical(prompt: PromptValue) -> list[tuple[str, str]]:
    if isinstance(prompt, str):
        return [("user", prompt.strip())]
    return [(message["role"], message["content"].strip()) for message in prompt]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode("ascii")).hexdigest()
