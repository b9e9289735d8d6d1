"""Bytes in use, as the operating system and the CUDA allocator count them."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from hydra_rlhf.runtime.tensor_bytes import TensorBytes

PROCESS_STATUS = Path("/proc/self/status")


def rss_bytes() -> int:
    """Resident bytes of this process now (where the system has no /proc: the highest so far)."""
    return _status_bytes("VmRSS") or _highest_by_getrusage()


def peak_rss_bytes() -> int:
    """Highest resident bytes of this process since it started.

    From /proc where there is one: `getrusage` also counts what the parent held before it started this program.
    """
    return _status_bytes("VmHWM") or _highest_by_getrusage()


def _status_bytes(field: str) -> int | None:
    if not PROCESS_STATUS.exists():
        return None
    for line in PROCESS_STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def _highest_by_getrusage() -> int:
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


METRIC_OF = {
    "rss_bytes": "memory/rss_bytes",
    "peak_rss_bytes": "memory/peak_rss_bytes",
    "cuda_allocated_bytes": "memory/cuda_allocated_bytes",
    "cuda_peak_allocated_bytes": "memory/cuda_peak_allocated_bytes",
    "cuda_peak_reserved_bytes": "memory/cuda_peak_reserved_bytes",
    "peak_tensor_bytes": "memory/peak_tensor_bytes",
}


class PhaseMemory:
    """What each named phase of a run needed; a phase that is entered again keeps its highest numbers.

    Per phase: `rss_bytes` (highest resident bytes seen at its ends), `peak_rss_bytes` (the process's high-water mark at
    its ends: exact for a phase that raised it, an upper bound for a phase that comes after a larger one; it is never
    reset, so that outside measurements of the process stay right). Once CUDA is in use also
    `cuda_peak_allocated_bytes` and `cuda_peak_reserved_bytes` over all devices, exact for every phase, because the
    allocator's peaks are reset at its start. With `track_tensors` also `peak_tensor_bytes`, the exact bytes of all
    tensors on the device at the worst moment of the phase; every operation is watched for it, which takes time.
    """

    def __init__(self, *, track_tensors: bool = False) -> None:
        self.track_tensors = track_tensors
        """May be set between phases."""
        self._phases: dict[str, dict[str, int]] = {}
        self._current: str | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block as part of phase `name`; phases do not nest. A block that raises is measured too."""
        assert self._current is None, f"memory phase {name!r} starts inside {self._current!r}"
        self._current = name
        for device in _cuda_devices():
            torch.cuda.reset_peak_memory_stats(device)
        watch = TensorBytes("cuda" if _cuda_devices() else "cpu") if self.track_tensors else None
        try:
            if watch is not None:
                watch.hold_existing()
            with watch or nullcontext():
                yield
        finally:
            self._current = None
            seen = self._phases.setdefault(name, {})
            tensors = {} if watch is None else {"peak_tensor_bytes": watch.peak}
            for key, count in (_measure() | tensors).items():
                seen[key] = max(count, seen.get(key, 0))

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Bytes as {phase: {quantity: bytes}}, phases in the order they were first entered; JSON-ready."""
        return {name: dict(seen) for name, seen in self._phases.items()}

    def metrics(self) -> dict[str, float]:
        """The `memory/*` metrics of this moment; the CUDA peaks are the highest of all phases so far."""
        numbers = _measure()
        for key in METRIC_OF:
            highest = [seen[key] for seen in self._phases.values() if key in seen]
            if highest and not key.endswith("rss_bytes"):
                numbers[key] = max([numbers.get(key, 0), *highest])
        if devices := _cuda_devices():
            numbers["cuda_allocated_bytes"] = sum(torch.cuda.memory_allocated(device) for device in devices)
        return {METRIC_OF[key]: float(count) for key, count in numbers.items()}


def _cuda_devices() -> range:
    """Asks without starting CUDA, which would take memory in a run that does not use it."""
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)


def _measure() -> dict[str, int]:
    numbers = {"rss_bytes": rss_bytes(), "peak_rss_bytes": peak_rss_bytes()}
    if devices := _cuda_devices():
        numbers["cuda_peak_allocated_bytes"] = sum(torch.cuda.max_memory_allocated(device) for device in devices)
        numbers["cuda_peak_reserved_bytes"] = sum(torch.cuda.max_memory_reserved(device) for device in devices)
    return numbers
