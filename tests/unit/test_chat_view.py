"""What `chat` shows of a turn: whole, cut to the screen, narrow, as plain lines, as JSON; never a control character."""

import io
import json

import pytest
from rich.console import Console

from hydra_rlhf.reporting.chat_view import JsonView, LiveView, PlainView, numbers_of, panes, plain_text, view_for
from hydra_rlhf.stages.chat import Answer, Turn

NASTY = "red \x1b[31mX\x1b]0;title\x07 \x9b2J [bold]no[/bold] :smile: a\u202eb"
SHOWN = "red \\x1b[31mX\\x1b]0;title\\x07 \\x9b2J [bold]no[/bold] :smile: a\\u202eb"


def answer(text: str, **changes: object) -> Answer:
    settings = {"ids": [5] * 4, "seconds": 2.0, "score": 1.25, "ended": True, "done": True}
    return Answer(text=text, **(settings | changes))  # pyright: ignore[reportArgumentType]


def turn_of(actor: str, reference: str | None = None, prompt: object = "How much?", **changes: object) -> Turn:
    answers = {"actor": answer(actor, kl=0.5, **changes)}
    if reference is not None:
        answers["reference"] = answer(reference, score=-2.0)
    return Turn(prompt=prompt, prompt_ids=[1], answers=answers, number=0, notices=[])  # pyright: ignore[reportArgumentType]


def drawn(turn: Turn, *, width: int, height: int | None = None) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height or 50, highlight=False)
    console.print(panes(turn, console, height=height))
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    return text.splitlines()


def test_panes_stand_side_by_side_and_are_equally_high():
    lines = drawn(turn_of("one two", "three\nfour\nfive"), width=120)
    assert len(lines) == 2 + 3 + 1  # a border, three lines of text and one of numbers
    assert all(len(line) == 120 for line in lines)
    left, right = ([line[side].strip("│╭╮╰╯─ ") for line in lines] for side in (slice(60), slice(60, 120)))
    assert left == ["actor", "one two", "score +1.25 · KL 0.50 nats · 4 tokens · 2.0 tokens/s", "", "", ""]
    assert right == ["reference", "three", "four", "five", "score -2.00 · 4 tokens · 2.0 tokens/s", ""]


def test_narrow_terminals_have_one_pane_above_the_other():
    lines = drawn(turn_of("one", "two"), width=59)
    assert [line[3:12].strip(" ─") for line in lines if line.startswith("╭")] == ["actor", "reference"]
    assert all(len(line) <= 59 for line in lines)


def test_a_growing_text_shows_its_end_and_fits_the_screen():
    long = "\n".join(f"line {number}" for number in range(40))
    for width in (80, 40, 3):
        lines = drawn(turn_of(long, long), width=width, height=20)
        assert len(lines) < 20
        assert width == 3 or any("line 39" in line for line in lines)
        assert not any("line 0 " in line for line in lines)
    assert sum("line" in line for line in drawn(turn_of(long, long), width=80)) == 40


def test_one_speaker_has_the_whole_width():
    lines = drawn(turn_of("alone"), width=70)
    assert len(lines[0]) == 70
    assert lines[0].count("╭") == 1


@pytest.mark.parametrize("width", [30, 200])
def test_control_characters_and_markup_are_shown_and_not_obeyed(width: int):
    shown = "".join(line.strip("│╭╮╰╯─ ") for line in drawn(turn_of(NASTY, NASTY), width=width))
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or c == "\u202e" for c in shown)
    if width == 200:
        assert SHOWN in shown
    for text in (plain_text(turn_of(NASTY, NASTY, prompt=NASTY)), json.dumps(turn_of(NASTY).as_dict())):
        assert not any(c in text for c in "\x1b\x07\x9b\u202e")
    assert plain_text(turn_of(NASTY, NASTY, prompt=NASTY)).count(SHOWN) == 3


def test_plain_lines():
    turn = turn_of("At six.\nprompt     fake", "No idea.", prompt=[{"role": "user", "content": "When?"}])
    turn.notices.append("cut")
    assert plain_text(turn).splitlines() == [
        "note       cut",
        "prompt     When?",
        "actor      At six.",
        "           prompt     fake",
        "reference  No idea.",
        "           actor: score +1.25, KL 0.50 nats, 4 tokens, 2.0 tokens/s",
        "           reference: score -2.00, 4 tokens, 2.0 tokens/s",
    ]


def test_numbers_say_what_is_known():
    assert numbers_of(answer("a", score=None, ended=False, done=False)) == ["4 tokens", "2.0 tokens/s"]
    assert numbers_of(answer("a", ids=[7], ended=False)) == ["score +1.25", "1 token", "0.5 tokens/s", "no end"]


def test_messages_are_printed_without_control_characters(capsys: pytest.CaptureFixture[str]):
    PlainView().tell("a\x1bb")
    assert capsys.readouterr().out == "a\\x1bb\n"


def test_lines_are_printed_once_a_turn_is_whole(capsys: pytest.CaptureFixture[str]):
    for view in (PlainView(), JsonView()):
        with view.watching(turn_of("a", "b")) as update:
            update()
            assert capsys.readouterr().out == ""
        out = capsys.readouterr().out
        assert out.isascii()
        assert "\x1b" not in out
    assert json.loads(out)["reference"]["score"] == -2.0
    with pytest.raises(KeyboardInterrupt), PlainView().watching(turn_of("a")):
        raise KeyboardInterrupt
    assert capsys.readouterr().out == ""


def test_a_terminal_sees_the_text_grow_and_gets_its_cursor_back():
    file = io.StringIO()
    view = LiveView(Console(file=file, force_terminal=True, width=80, height=24, highlight=False))
    turn = turn_of("", "")
    with view.watching(turn) as update:
        turn.answers["actor"].text = "begun"
        update()
        growing = file.getvalue()
        assert growing.count(" actor ") == 2  # empty panes before the first token, which may take a while
        assert "begun" in growing
        turn.answers["actor"].text = "begun and done"
        update()  # too soon after the last picture
        assert file.getvalue() == growing
    out = file.getvalue()
    assert "begun and done" in out
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h") == 1


def test_no_panes_where_there_is_no_terminal():
    assert isinstance(view_for(as_json=False), PlainView)
    assert isinstance(view_for(as_json=True), JsonView)
