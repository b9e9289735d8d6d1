"""The two measured rates: the least time counts, and bytes and operations are counted once."""

import itertools

import pytest
import torch

from hydra_rlhf.benchmark import machine


def test_the_least_time_counts_and_the_first_call_does_not(monkeypatch: pytest.MonkeyPatch):
    # Calls take 1, 5, 3, 4, 2, ... s; without the first one the timed calls sum to 12 s after three, enough for 10.
    lengths = iter([1.0, 5.0, 3.0, 4.0, 2.0])
    clock = itertools.accumulate(itertools.chain.from_iterable((0.0, length) for length in lengths))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    calls: list[int] = []
    assert machine.shortest(lambda: calls.append(1), torch.device("cpu"), 10.0) == 3.0
    assert len(calls) == 4


def test_bytes_and_operations_over_seconds(monkeypatch: pytest.MonkeyPatch):
    # Reading, copying and the product take 2 s, 1 s and 4 s. Of 800 bytes all are read once, or half copied onto half:
    # 800 bytes move in either case. The product of 10 x 10 takes 2 x 1000 operations.
    taken = iter([2.0, 1.0, 4.0])

    def run_once(work, device, seconds):
        work()
        return next(taken)

    monkeypatch.setattr(machine, "shortest", run_once)
    found = machine.measure_machine(torch.device("cpu"), torch.bfloat16, array_bytes=800, matrix_size=10)
    assert found == machine.Machine(bandwidth=800.0, matrix_rate=500.0, array_bytes=800, matrix_size=10)
