"""What `hydra-rlhf chat` shows: two panes that fill up on a terminal, plain lines or JSON lines elsewhere."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hydra_rlhf.reporting.console import printable

if TYPE_CHECKING:
    from hydra_rlhf.stages.chat import Answer, Turn

FRAME_S = 1 / 15
"""Least time between two pictures of a growing text."""
MIN_PANE_WIDTH = 30
"""Panes stand one above the other where they would be narrower."""
FRAME_COLUMNS, FRAME_LINES = 4, 6
"""What a pane needs besides its text: a border, a column of space on each side, numbers and a line for the cursor."""
INDENT = 11
LINE_BREAK = "\n" + " " * INDENT
STYLES = {"actor": "cyan", "reference": "magenta"}


class PlainView:
    """Each turn as lines of text once it is done; no escape code, no control character."""

    @contextmanager
    def watching(self, turn: "Turn") -> Iterator[Callable[[], None]]:
        """Print the turn when it is made."""
        yield lambda: None
        print(plain_text(turn), flush=True)

    def tell(self, message: str) -> None:
        """A line that is nobody's response."""
        print(printable(message), flush=True)


class JsonView:
    """Each turn as one line of JSON (ASCII)."""

    @contextmanager
    def watching(self, turn: "Turn") -> Iterator[Callable[[], None]]:
        """Print the turn when it is made."""
        yield lambda: None
        print(json.dumps(turn.as_dict()), flush=True)


class LiveView:
    """A pane for each role, side by side, that fills up while tokens are drawn."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)

    @contextmanager
    def watching(self, turn: "Turn") -> Iterator[Callable[[], None]]:
        """Show the end of the texts while they grow, and all of them at last."""
        for notice in turn.notices:
            self.tell(notice)
        shown_at = 0.0

        def update() -> None:
            nonlocal shown_at
            if time.monotonic() - shown_at >= FRAME_S:
                live.update(panes(turn, self.console, height=self.console.height), refresh=True)
                shown_at = time.monotonic()

        # Nothing is drawn by a thread of its own: it would take turns with the model on the same cores.
        first = panes(turn, self.console, height=self.console.height)
        with Live(first, console=self.console, auto_refresh=False, transient=True, vertical_overflow="crop") as live:
            yield update
        self.console.print(panes(turn, self.console, height=None))

    def tell(self, message: str) -> None:
        """A line that is nobody's response."""
        self.console.print(Text(printable(message), style="dim"))


View = PlainView | JsonView | LiveView
"""Where turns are shown."""


def view_for(*, as_json: bool) -> View:
    """Panes where standard output is a terminal that can move its cursor, else lines."""
    if as_json:
        return JsonView()
    view = LiveView()
    return view if sys.stdout.isatty() and not view.console.is_dumb_terminal else PlainView()


def panes(turn: "Turn", console: Console, *, height: int | None) -> RenderableType:
    """The responses with their numbers; with a `height` the last lines that fit it, else everything."""
    num_panes = len(turn.answers)
    beside = num_panes * MIN_PANE_WIDTH <= console.width
    width = console.width // num_panes if beside else console.width
    inside = max(1, width - FRAME_COLUMNS)
    lines = None if height is None else max(1, height // (1 if beside else num_panes) - FRAME_LINES)
    bodies: dict[str, Text] = {}
    for role, answer in turn.answers.items():
        text = Text(printable(answer.text)).wrap(console, inside)
        numbers = Text(" · ".join(numbers_of(answer)), style="dim").wrap(console, inside)
        bodies[role] = Text("\n").join([*text[-lines if lines else 0 :], *numbers])
    highest = max(body.plain.count("\n") for body in bodies.values()) + 3
    drawn = [
        Panel(
            body,
            title=Text(role, style="bold"),
            title_align="left",
            border_style=STYLES[role],
            width=width,
            height=highest if beside else None,
        )
        for role, body in bodies.items()
    ]
    if not beside:
        return Group(*drawn)
    grid = Table.grid()
    grid.add_row(*drawn)
    return grid


def plain_text(turn: "Turn") -> str:
    """The turn as text: the prompt, each response, and the numbers."""
    prompt = turn.prompt if isinstance(turn.prompt, str) else turn.prompt[-1]["content"]
    rows = [("note", notice) for notice in turn.notices]
    rows += [("prompt", prompt), *((role, answer.text) for role, answer in turn.answers.items())]
    rows += [("", f"{role}: {', '.join(numbers_of(answer))}") for role, answer in turn.answers.items()]
    # Lines after the first stand below the first, so that none of them is taken for a row.
    return "\n".join(f"{name:{INDENT}}{printable(text)}".replace("\n", LINE_BREAK) for name, text in rows) + "\n"


def numbers_of(answer: "Answer") -> list[str]:
    """What is known about a response so far, in words."""
    known = [] if answer.score is None else [f"score {answer.score:+.2f}"]
    known += [] if answer.kl is None else [f"KL {answer.kl:.2f} nats"]
    known += [f"{len(answer.ids)} token{'s' * (len(answer.ids) != 1)}", f"{answer.tokens_per_s:.1f} tokens/s"]
    return [*known, "no end"] if answer.done and not answer.ended else known
