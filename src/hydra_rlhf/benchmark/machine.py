"""What the machine can do: the bandwidth of its memory and the rate of its matrix products, both measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

ARRAY_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Of the array that is read, and whose first half is copied onto its second: many times the caches."""
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices, large enough that the product is all that takes time."""
SECONDS = 0.5
"""Each measurement goes on for at least so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Two rates of one device in one dtype."""

    bandwidth: float
    """Bytes per second: the better of reading an array once and copying it."""
    matrix_rate: float
    """Floating-point operations per second of a large product."""
    array_bytes: int
    matrix_size: int


@cache
def this_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Both rates of a device, measured once in a process."""
    return measure_machine(device, dtype)


@torch.no_grad()
def measure_machine(
    device: torch.device,
    dtype: torch.dtype,
    *,
    array_bytes: int | None = None,
    matrix_size: int | None = None,
    seconds: float = SECONDS,
) -> Machine:
    """Both rates on `device`; the product in `dtype`, the arrays as float32, since bytes are bytes."""
    array = torch.zeros((array_bytes or ARRAY_BYTES[device.type]) // 8 * 2, device=device)
    first, second = array.chunk(2)
    num_bytes = 4 * array.numel()
    reading = num_bytes / shortest(array.sum, device, seconds)
    copying = num_bytes / shortest(lambda: second.copy_(first), device, seconds)  # noqa: F821  # half is read, half written
    del array, first, second
    size = matrix_size or MATRIX_SIZE[device.type]
    a = torch.randn(size, size, device=device).to(dtype)
    product = torch.empty_like(a)
    rate = 2 * size**3 / shortest(lambda: torch.mm(a, a, out=product), device, seconds)
    return Machine(bandwidth=max(reading, copying), matrix_rate=rate, array_bytes=num_bytes, matrix_size=size)


def shortest(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The least seconds of one call, over at least three and at least `seconds` of them; the first one is not timed."""
    run_through(work, device)
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        times.append(run_through(work, device))
    return min(times)


def run_through(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's part included."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
