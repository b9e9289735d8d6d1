"""Seconds and memory of the phases of one step."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from hydra_rlhf.runtime.measure import PhaseMemory


class Stopwatch:
    """Times the phases of one training step; on CUDA it waits for the device at phase ends, so that times are true."""

    def __init__(self, memory: PhaseMemory) -> None:
        self._memory = memory
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block as phase `name`."""
        start = time.perf_counter()
        with self._memory.phase(name):
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        self._seconds[name] = time.perf_counter() - start

    def metrics(self, num_tokens: Mapping[str, int]) -> dict[str, float]:
        """`time/<phase>_s` and `time/step_s`, and `<phase>/tokens_per_s` for phases with a token count."""
        times = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        rates = {f"{name}/tokens_per_s": count / self._seconds[name] for name, count in num_tokens.items()}
        return times | rates | {"time/step_s": time.perf_counter() - self._start}
