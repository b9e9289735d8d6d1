"""SIGINT and SIGTERM as a question the loops ask at places where stopping is safe."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from hydra_rlhf.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, the first SIGINT or SIGTERM only sets a flag, and a second one ends the process at once.

    Ending at once skips all clean-up and is safe all the same: checkpoints appear by rename, whole or not at all.
    Outside the main thread, where Python allows no signal handlers, it installs nothing and never asks to stop.

        with StopRequest() as stop:
            for step in range(num_steps):
                stop.check()
    """

    def __init__(self) -> None:
        self._signal_number: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """True once a signal has asked the run to stop."""
        return self._signal_number is not None

    def check(self) -> None:
        """Stop here if asked to. Raises `Interrupted` with the signal's number, again at every later call."""
        if self._signal_number is not None:
            raise Interrupted(self._signal_number)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        # os.write, because a handler may run inside a print, and buffered streams refuse to be entered twice.
        if self._signal_number is not None:
            show_cursor = b"\x1b[?25h" if os.isatty(2) else b""  # a progress bar may have hidden it
            os.write(2, show_cursor + b"\nstopped at once\n")
            os._exit(128 + number)
        self._signal_number = number
        os.write(2, b"\nstopping at the next safe point; the same signal again stops at once\n")
