"""Seconds and memory of the phases of one step."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from hydra_rlhf.runtime.measure import PhaseMemory
from hydra_rlhf.stages.limits import release

SECONDS_OF = {"rollout": "time/rollout_s", "score": "time/score_s", "update": "time/update_s"}
"""Metric of each phase's seconds."""
RATE_OF = {"rollout": "rollout/tokens_per_s", "update": "update/tokens_per_s"}
"""Metric of each phase's response tokens per second."""


class Stopwatch:
    """Times the phases of one training step; on CUDA it waits for the device at phase ends, so that times are true."""

    def __init__(self, memory: PhaseMemory) -> None:
        self._memory = memory
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block as phase `name`; memory it leaves unused is handed back, so that the next can have it."""
        start = time.perf_counter()
        with self._memory.phase(name):
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        release()  # after the measurement: what the phase held belongs to it
        self._seconds[name] = time.perf_counter() - start

    def metrics(self, num_tokens: Mapping[str, int]) -> dict[str, float]:
        """Seconds of the phases that have a metric, and tokens per second of those with a token count."""
        times = {SECONDS_OF[name]: seconds for name, seconds in self._seconds.items() if name in SECONDS_OF}
        rates = {RATE_OF[name]: count / self._seconds[name] for name, count in num_tokens.items()}
        return times | rates | {"time/step_s": self.seconds}

    @property
    def seconds(self) -> float:
        """Since the step began."""
        return time.perf_counter() - self._start
