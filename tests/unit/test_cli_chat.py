"""The conversation at a terminal: what is kept, what commands do, what Ctrl-C and the end of input do."""

import argparse
import io
import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from contract.test_chat import speakers_of
from contract.tiny import randomise_adapters, tiny_hydra
from rich.console import Console

from hydra_rlhf import cli_chat
from hydra_rlhf.cli_chat import COMMANDS, Conversation, first_interrupt_only_asks, read_prompt, temperature
from hydra_rlhf.cli_evaluation import checkpoint_name
from hydra_rlhf.data.rows import Message
from hydra_rlhf.reporting.chat_view import LiveView
from hydra_rlhf.stages.chat import Speakers


@pytest.fixture(autouse=True)
def interrupts_arrive() -> Iterator[None]:
    """SIGINT as a shell's foreground has it; tests that run in the background inherit that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def typed(monkeypatch: pytest.MonkeyPatch, lines: Iterable[str | type[BaseException]]) -> None:
    """What `input` returns or raises, one after the other; EOFError at the end."""
    left = iter(lines)

    def read(_prompt: str = "") -> str:
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def held(
    monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException], template: str = "plain", **sampling: Any
) -> tuple[Conversation, str]:
    """The conversation after these lines, and all that was shown."""
    hydra = tiny_hydra("hydra-ppo")
    randomise_adapters(hydra)
    typed(monkeypatch, lines)
    console = Console(file=io.StringIO(), width=400, height=50, highlight=False)
    conversation = Conversation(
        speakers_of(hydra, template=template, **({"min_response_tokens": 8} | sampling)), LiveView(console)
    )
    conversation.hold()
    return conversation, console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def test_the_actors_answer_stays_and_both_see_the_same_history(monkeypatch: pytest.MonkeyPatch):
    conversation, shown = held(monkeypatch, "a", "b")
    assert [message["role"] for message in conversation.history] == ["user", "assistant"] * 2
    last = conversation.last
    assert last is not None
    assert last.prompt == conversation.history[:3]
    assert conversation.history[0] == user("a")
    assert conversation.history[3]["content"] == last.answers["actor"].text
    assert last.number == 1
    assert "hydra-ppo), last (step 2): actor and reference at temperature 1, up to 8 tokens; a conversation" in shown
    assert shown.count("score ") == 4


def test_keep_chooses_whose_answer_stays(monkeypatch: pytest.MonkeyPatch):
    conversation, shown = held(monkeypatch, "/keep actor", "a", "/keep nobody", "/keep reference")
    assert conversation.last is not None
    actor, reference = (conversation.last.answers[role].text for role in ("actor", "reference"))
    assert actor != reference
    assert conversation.history == [user("a"), {"role": "assistant", "content": reference}]
    assert "nothing was answered yet" in shown
    assert "/keep nobody: choose one of actor, reference" in shown
    conversation.obey("/keep actor")
    assert conversation.history[-1]["content"] == actor


def test_reset_begins_anew(monkeypatch: pytest.MonkeyPatch):
    conversation, _ = held(monkeypatch, "a", "/reset")
    assert conversation.history == []
    assert conversation.last is None
    conversation.say("b")
    assert conversation.last is not None
    assert conversation.last.prompt == [user("b")]


def test_without_a_template_each_prompt_stands_by_itself(monkeypatch: pytest.MonkeyPatch):
    conversation, shown = held(monkeypatch, "a", "/keep reference", "b", template="none")
    assert conversation.history == []
    assert conversation.last is not None
    assert conversation.last.prompt == "b"
    assert "each prompt by itself (no chat template)" in shown
    assert "nothing to keep: each prompt is answered by itself" in shown


def test_sampling_is_changed_from_the_next_prompt_on(monkeypatch: pytest.MonkeyPatch):
    conversation, shown = held(
        monkeypatch, "/temperature 0", "/max-tokens 3", "/temperature -1", "/max-tokens x", "/max-tokens 999", "a"
    )
    assert conversation.speakers.sampling.top_k == 1
    assert conversation.last is not None
    assert len(conversation.last.answers["actor"].ids) == 3
    for told in (
        "temperature 0 from here on",
        "max-tokens 3 from here on",
        "/temperature -1: give a number, e.g. /temperature 0.7",
        "/max-tokens x: give a number, e.g. /max-tokens 64",
        "ConfigError: responses of 999 tokens do not fit this model, which has 64 positions",
    ):
        assert told in shown


def test_help_names_every_command_and_unknown_ones_are_told(monkeypatch: pytest.MonkeyPatch):
    conversation, shown = held(monkeypatch, "/help", "/halp", " ", "/quit", "never read")
    for command in COMMANDS:
        assert command in shown
    assert "/halp is no command" in shown
    assert conversation.num_asked == 0


def test_a_prompt_may_begin_with_a_slash_behind_a_space(monkeypatch: pytest.MonkeyPatch):
    conversation, _ = held(monkeypatch, " /quit is", template="none")
    assert conversation.last is not None
    assert conversation.last.prompt == " /quit is"


def test_a_prompt_that_cannot_be_read_is_told_and_forgotten(monkeypatch: pytest.MonkeyPatch):
    conversation, shown = held(monkeypatch, "a", "caf\udce9", "b")
    assert "DataError: the prompt 'caf\\udce9' is not UTF-8" in shown
    assert [message["content"] for message in conversation.history[::2]] == ["a", "b"]


def test_examples_are_the_held_out_prompts_in_turn(monkeypatch: pytest.MonkeyPatch):
    prompts = ["first", [user("second"), {"role": "assistant", "content": "yes"}, user("third")]]
    monkeypatch.setattr(Speakers, "examples", lambda _: prompts)
    conversation, shown = held(monkeypatch, "a", "/example", "/example")
    assert conversation.history[:-1] == prompts[1]
    assert "assistant: yes" in shown
    conversation.obey("/example")
    assert conversation.history[0] == user("first")
    assert len(conversation.history) == 2


def test_lines_that_end_in_a_backslash_go_on(monkeypatch: pytest.MonkeyPatch):
    typed(monkeypatch, ["one\\", "two\\", "three", "four"])
    assert read_prompt() == "one\ntwo\nthree"
    assert read_prompt() == "four"


def test_ctrl_c_stops_a_response_and_the_next_one_leaves(monkeypatch: pytest.MonkeyPatch):
    rounds = Speakers.rounds

    def interrupted(self: Speakers, turn: Any) -> Any:
        for number, _ in enumerate(rounds(self, turn), 1):
            if number == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield

    monkeypatch.setattr(Speakers, "rounds", interrupted)
    conversation, shown = held(monkeypatch, "a")
    assert conversation.last is not None
    assert [len(answer.ids) for answer in conversation.last.answers.values()] == [3, 3]
    assert "no end" in shown
    assert len(conversation.history) == 2  # what there is of it stays
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        held(monkeypatch, KeyboardInterrupt)


def test_a_second_ctrl_c_does_not_wait():
    seen = []
    with pytest.raises(KeyboardInterrupt), first_interrupt_only_asks() as stopped:  # noqa: PT012 (the second one raises)
        seen.append(stopped())
        os.kill(os.getpid(), signal.SIGINT)
        seen.append(stopped())
        os.kill(os.getpid(), signal.SIGINT)
    assert seen == [False, True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_leaves_through_the_cleaning_up():
    with pytest.raises(SystemExit) as left, cli_chat.terminated_as_an_exit():
        os.kill(os.getpid(), signal.SIGTERM)
    assert left.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("text", ["-0.5", "0.0001", "inf", "nan", "warm"])
def test_temperatures_that_are_none(text: str):
    with pytest.raises((ValueError, argparse.ArgumentTypeError)):
        temperature(text)
    assert temperature("0") == 0
    assert temperature("0.7") == 0.7


@pytest.mark.parametrize("text", ["latest", "-1", "1.5", "²", ""])
def test_checkpoints_that_are_none(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="neither last nor best"):
        checkpoint_name(text)
    assert checkpoint_name("12") == "12"
