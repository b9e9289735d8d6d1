"""`hydra-rlhf chat` on a tiny run: for scripts in this process, and a conversation on a pseudo-terminal."""

import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hydra_rlhf.stages.pipeline import run_recipe
from smoke.tiny_runs import command, environment, exit_code, recipe

SECONDS = 120


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on conversations, so that its prompts have a template."""
    folder = tmp_path_factory.mktemp("chat")
    rows = [
        {"prompt": [{"role": "user", "content": f"where is cat {n}?"}], "chosen": "on the mat", "rejected": f"gone {n}"}
        for n in range(40)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(folder / "pairs.jsonl"), "max_prompt_tokens": 48, "max_response_tokens": 16}
    return run_recipe(recipe(folder, data=data), until="ppo")


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict]:
    """What a script reads."""
    assert exit_code("chat", *words, "--json") == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_scripts_get_a_line_of_json_for_each_prompt(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = asked(capsys, str(finished), "--prompt", "where is cat 1?", "--prompt", "two\nlines")
    assert [turn["prompt"] for turn in first] == ["where is cat 1?", "two\nlines"]
    for turn in first:
        assert isinstance(turn["kl"], float)
        for role in ("actor", "reference"):
            assert 1 <= turn[role]["tokens"] <= 6  # as in PPO
            assert isinstance(turn[role]["score"], float)
    # The same through a pipe; empty lines are no prompts.
    monkeypatch.setattr("sys.stdin", io.StringIO("where is cat 1?\n\n  \nwhere is cat 2?"))
    piped = asked(capsys, str(finished))
    assert [turn["prompt"] for turn in piped] == ["where is cat 1?", "where is cat 2?"]
    assert without_time(piped[0]) == without_time(first[0])
    # Other samples, another policy: the start of the run has no KL from itself.
    assert without_time(asked(capsys, str(finished), "--prompt", "where is cat 1?", "--seed", "1")[0]) != piped[0]
    options = ("--prompt", "where is cat 1?", "--temperature", "0", "--max-tokens", "3")
    one, two = (asked(capsys, str(finished), *options, "--checkpoint", step)[0] for step in ("1", "last"))
    assert one["actor"]["tokens"] <= 3
    assert one["reference"]["response"] == two["reference"]["response"]
    assert one["kl"] != two["kl"]


def without_time(turn: dict) -> dict:
    """A turn without what a clock says."""
    return {
        key: {name: number for name, number in value.items() if name != "tokens_per_s"}
        if isinstance(value, dict)
        else value
        for key, value in turn.items()
    }


def test_a_pipe_gets_plain_lines(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("chat", str(finished), "--prompt", "where is \x1b[31mcat 3?") == 0
    out = capsys.readouterr().out
    assert out.startswith("prompt     where is \\x1b[31mcat 3?\nactor      ")
    assert "\nreference  " in out
    assert re.search(r"\n +actor: score [+-]\d+\.\d\d, KL -?\d+\.\d\d nats, \d tokens, [\d.]+ tokens/s", out)
    assert "\x1b" not in out


def test_a_reader_that_has_enough_is_no_error_of_ours(
    finished: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    left: list[int] = []
    monkeypatch.setattr("os.dup2", lambda _, number: left.append(number))
    monkeypatch.setattr("sys.stdout", Closed())
    assert exit_code("chat", str(finished), "--prompt", "a", "--json") == 1
    assert left == [1]
    assert capfd.readouterr().err == ""


def test_a_run_without_a_template_and_wrong_words(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    strings = shutil.copytree(finished, tmp_path / "strings")
    (strings / "chat.json").write_text('{"template": "none"}')
    assert asked(capsys, str(strings), "--prompt", "where is cat 1?")[0]["actor"]["tokens"]
    for words, error in (
        (("--checkpoint", "9"), "step-000009 does not exist; checkpoints here: [1, 2]"),
        (("--max-tokens", "100000"), "responses of 100000 tokens do not fit this model, which has"),
        (("--prompt", "caf\udce9"), "is not UTF-8"),
        (("--temperature", "-1"), "-1 is neither 0 nor at least 0.001"),
        (("--checkpoint", "latest"), "'latest' is neither last nor best"),
    ):
        assert exit_code("chat", str(finished), "--prompt", "a", *words) == 2
        assert error in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert exit_code("chat", str(finished)) == 2
    assert "standard input is not UTF-8" in capsys.readouterr().err
    assert exit_code("chat", str(tmp_path)) == 2


WITH_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background would hand on that it is ignored
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, sys.argv[1:])
"""
"""Runs a command with standard input as its controlling terminal, so that Ctrl-C there is a signal here."""


class Terminal:
    """A process on a pseudo-terminal of 100 columns and 30 lines, killed at the end of the block if it is still there.

    with Terminal("chat", "runs/quick", cwd=folder) as terminal:
        terminal.read_until("you> ")
    """

    def __init__(self, *argv: str, cwd: Path) -> None:
        self._master, side = pty.openpty()
        variables = {name: value for name, value in environment().items() if name not in ("COLUMNS", "NO_COLOR")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", WITH_TERMINAL, *command(*argv)],
            cwd=cwd,
            env=variables | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"},
            stdin=side,
            stdout=side,
            stderr=side,
            start_new_session=True,
        )
        os.close(side)
        self._seen = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def type(self, text: str) -> None:
        """Press these keys."""
        os.write(self._master, text.encode())

    def read_until(self, pattern: str, *, pressing: str = "") -> str:
        """What came since the last call, up to and with the pattern; an empty one is the end of the process.

        Keys in `pressing` are pressed again in every second without a word: the line editor misses a signal that comes
        after its prompt and before it waits.
        """
        until = time.monotonic() + SECONDS
        while not (pattern and (found := re.search(pattern, self._seen, re.S))):
            assert time.monotonic() < until, f"no {pattern!r} in {self._seen!r}"
            if select.select([self._master], [], [], 1.0)[0]:
                try:
                    self._seen += os.read(self._master, 65536).decode(errors="replace")
                except OSError:  # the other side is closed
                    assert not pattern, f"no {pattern!r} in {self._seen!r}"
                    return self._seen
            elif pressing:
                self.type(pressing)
        text, self._seen = self._seen[: found.end()], self._seen[found.end() :]
        return text

    def exit_code(self) -> int:
        """Of a process that ends by itself."""
        return self._process.wait(SECONDS)


def test_a_conversation_at_a_terminal(finished: Path, tmp_path: Path) -> None:
    endless = shutil.copytree(finished, tmp_path / "endless")
    settings = (endless / "recipe.yaml").read_text()
    assert settings.count("min_response_tokens: 1\n") == settings.count("max_response_tokens: 6\n") == 1
    settings = settings.replace("min_response_tokens: 1\n", "min_response_tokens: 400\n")
    (endless / "recipe.yaml").write_text(settings.replace("max_response_tokens: 6\n", "max_response_tokens: 400\n"))
    with Terminal("chat", str(endless), cwd=tmp_path) as terminal:
        greeting = terminal.read_until("you> ")
        assert "last (step 2): actor and reference at temperature 1, up to 400 tokens" in plain(greeting)
        # A response of two tokens, and all that is shown of it.
        terminal.type("/max-tokens 2\n")
        terminal.read_until("you> ")
        terminal.type("/example\n")
        turn = terminal.read_until("you> ")
        assert re.search(r"user: where is cat \d+\?", plain(turn))
        assert turn.rindex("\x1b[?25h") > turn.rindex("\x1b[?25l")  # the cursor was hidden and came back
        assert re.search(r"╭─ actor ─+╮╭─ reference ─+╮", plain(turn))
        assert len(re.findall(r"score [+-]\d+\.\d\d", plain(turn))) >= 2
        terminal.type("/keep reference\n")
        assert "goes on from the reference's answer" in plain(terminal.read_until("you> "))
        # Ctrl-C stops a long response as soon as some of it is seen; the conversation goes on.
        terminal.type("/max-tokens 400\n")
        terminal.read_until("you> ")
        terminal.type("where is cat 2?\n")
        terminal.read_until("[2-9] tokens ·")
        terminal.type("\x03")
        stopped = plain(terminal.read_until("you> "))
        lengths = [int(number) for number in re.findall(r"(\d+) tokens? ·", stopped)]
        assert lengths[-2] == lengths[-1] < 400
        assert "no end" in stopped
        # And once more, with nothing to stop, leaves.
        terminal.type("\x03")
        assert "Traceback" not in terminal.read_until("", pressing="\x03")
        assert terminal.exit_code() == 130


def plain(text: str) -> str:
    """Without escape codes."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
