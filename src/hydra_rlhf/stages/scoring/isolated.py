"""A reward function in a process of its own, which can be killed where it hangs and replaced where it has ended."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

from hydra_rlhf.errors import ConfigError, RewardFunctionError
from hydra_rlhf.stages.scoring.outcomes import Failure, Outcome, ScoreRequest, all_failed

WORKER = "hydra_rlhf.stages.scoring.worker"
START_TIMEOUT_S = 300.0
"""Seconds in which the process must have imported the function; not part of a call's time."""
KILL_TIMEOUT_S = 5.0
"""Seconds for the pipes of a killed process to close."""


class IsolatedFunction:
    """Calls `module:function` in another process. Keeps nothing between calls but the process itself."""

    def __init__(self, name: str, *, timeout_s: float | None) -> None:
        self.name = name
        self.timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._takes: list[str] | None = None
        self._ready = False

    def start(self) -> None:
        """Start the process, if there is none. It imports the function while the caller goes on."""
        if self._process is not None:
            return
        # The other process finds what this one finds, also what was put in the path by hand.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._ready = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER, self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the training process, and a kill reaches all it has started
        )

    def wait_until_ready(self) -> None:
        """Wait until the function is imported. Raises `ConfigError` where it cannot be."""
        self.start()
        if self._ready:
            return
        answer = self._exchange(None, START_TIMEOUT_S)
        if isinstance(answer, str):
            raise ConfigError(f"the process of the isolated function {self.name!r} did not start: it {answer}")
        if "error" in answer:
            self.close()
            raise ConfigError(f"an isolated reward source: {answer['error']}")
        self._takes, self._ready = answer["takes"], True

    def __call__(self, request: ScoreRequest) -> list[Outcome]:
        """The function's outcomes; all failed where it took too long or its process ended, which is then replaced."""
        self.wait_until_ready()
        columns = request.columns
        if self._takes is not None:
            columns = {name: column for name, column in columns.items() if name in self._takes}
        message = as_line(request, columns, self.name)
        answer = self._exchange(message, self.timeout_s)
        if isinstance(answer, str):
            self.start()
            return all_failed(answer, len(request.responses))
        return [Failure(**found) if isinstance(found, dict) else found for found in answer["outcomes"]]

    def close(self) -> None:
        """End the process and all it has started."""
        process, self._process, self._ready = self._process, None, False
        if process is None:
            return
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(OSError):  # what was still in the buffer has no reader any more
                pipe.close()

    def _exchange(self, message: bytes | None, timeout_s: float | None) -> dict[str, Any] | str:
        """The process's answer to a message (None: to its start); where there is none, why, and the process is gone."""
        process = self._process
        assert process is not None
        requests, answers = process.stdin, process.stdout
        assert requests is not None
        assert answers is not None
        lines: list[bytes] = []

        def talk() -> None:
            try:
                if message is not None:
                    requests.write(message)
                    requests.flush()
                lines.append(answers.readline())
            except (OSError, ValueError):  # the process has gone, or `close` has shut the pipes
                lines.append(b"")

        # A thread, because a pipe has no timeout and may be full in both directions; it ends with the process.
        thread = threading.Thread(target=talk, daemon=True)
        thread.start()
        thread.join(timeout_s)
        if thread.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            thread.join(KILL_TIMEOUT_S)
            self.close()
            return f"took longer than timeout_s={timeout_s:g}"
        if not lines[0].endswith(b"\n"):
            self.close()
            return f"ended its process (exit code {process.returncode})"
        return json.loads(lines[0])


def as_line(request: ScoreRequest, columns: dict[str, list[Any]], name: str) -> bytes:
    """A request as one line of JSON. Raises `RewardFunctionError` for a column that JSON has no form for."""
    fields = {
        "prompts": request.prompts,
        "originals": [],
        "responses": request.responses,
        "response_ids": request.response_ids,
        "columns": columns,
    }
    try:
        return json.dumps(fields).encode() + b"\n"
    except TypeError as error:
        raise RewardFunctionError(
            f"the isolated function {name!r} takes a column that cannot be sent to it: {error}; leave the column "
            "out of its parameters, or set isolate: false"
        ) from error
