"""How far a stage is: a bar on a terminal, a few plain lines elsewhere; always on stderr."""

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINE_INTERVAL_S = 5.0
"""Without a terminal a line appears after this many seconds, at every tenth of the steps and at the last one."""


class Progress:
    """Shows stage, step, time left, tokens per second and a few numbers.

        with Progress("ppo", 100) as progress:
            for step in range(100):
                progress.advance(num_tokens, {"score": 1.25, "KL": 0.5})

    Prints inside the block appear above the bar.
    """

    def __init__(
        self,
        stage: str,
        num_steps: int,
        *,
        done: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`done` steps of `num_steps` were done before (a resumed stage) and do not count towards the speed."""
        self._stage, self._num_steps, self._first_step, self._step = stage, num_steps, done, done
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._start = self._last_step_at = self._last_line_at = clock()
        self._bar: RichProgress | None = None

    def __enter__(self) -> "Progress":
        self._start = self._last_step_at = self._last_line_at = self._clock()
        if self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self._console,
                redirect_stdout=sys.stdout.isatty(),  # what is piped elsewhere must not end up on stderr
            )
            self._bar.start()
            self._task = self._bar.add_task(self._stage, total=self._num_steps, completed=self._step, numbers="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def advance(self, num_tokens: int, numbers: Mapping[str, float]) -> None:
        """One more step is done; it handled `num_tokens` tokens. `numbers` are shown by their names, in this order."""
        self._step += 1
        now = self._clock()
        rate = num_tokens / max(now - self._last_step_at, 1e-9)
        shown = [f"{rate:,.0f} tokens/s", *(f"{name} {number:.3g}" for name, number in numbers.items())]
        if self._bar is not None:
            self._bar.update(self._task, completed=self._step, numbers="  ".join(shown))
        elif self._passed_a_tenth() or now - self._last_line_at >= LINE_INTERVAL_S:
            self._last_line_at = now
            line = "  ".join([f"{self._stage} {self._step}/{self._num_steps}", self._time_left(now), *shown])
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._last_step_at = now

    def _passed_a_tenth(self) -> bool:
        return 10 * self._step // self._num_steps > 10 * (self._step - 1) // self._num_steps

    def _time_left(self, now: float) -> str:
        per_step = (now - self._start) / (self._step - self._first_step)
        seconds = round(per_step * (self._num_steps - self._step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"
