import mmap
import subprocess
import sys

import pytest
import torch

from hydra_rlhf.memory.measure import PhaseMemory, count_tensor_bytes, peak_rss_bytes, rss_bytes

MIB = 2**20


def test_resident_bytes_follow_what_is_touched():
    before = rss_bytes()
    block = mmap.mmap(-1, 64 * MIB)
    for page in range(0, len(block), 4096):
        block[page] = 1
    during = rss_bytes()
    block.close()
    # 64 MiB were touched and given back; a few MiB may move elsewhere in the process.
    assert 56 * MIB <= during - before <= 72 * MIB
    assert peak_rss_bytes() >= during - MIB  # the kernel counts pages in batches
    assert rss_bytes() <= during - 56 * MIB


def test_peak_is_that_of_this_program_and_not_of_its_parent():
    block = bytearray(b"x") * (256 * MIB)
    code = "from hydra_rlhf.runtime.measure import peak_rss_bytes; import os; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50 * MIB < int(done.stdout) < peak_rss_bytes() - 100 * MIB
    del block


def test_phases_keep_their_highest_numbers():
    memory = PhaseMemory()
    with memory.phase("small"):
        pass
    block = bytearray(b"x") * (300 * MIB + peak_rss_bytes() - rss_bytes())
    with memory.phase("large"):
        pass
    del block
    with pytest.raises(ValueError, match="mine"), memory.phase("small"):
        raise ValueError("mine")
    measured = memory.as_dict()
    assert list(measured) == ["small", "large"]
    assert measured["large"]["peak_rss_bytes"] - MIB > measured["small"]["rss_bytes"] + 200 * MIB
    # The process's mark never falls, so the later end of "small" saw that of "large".
    assert measured["small"]["peak_rss_bytes"] >= measured["large"]["peak_rss_bytes"] - MIB
    assert memory.metrics()["memory/peak_rss_bytes"] >= measured["large"]["peak_rss_bytes"] - MIB
    assert set(memory.metrics()) >= {"memory/rss_bytes", "memory/peak_rss_bytes"}


def test_phases_do_not_nest():
    memory = PhaseMemory()
    with memory.phase("outer"), pytest.raises(AssertionError, match=r"inner.*outer"), memory.phase("inner"):
        pass
    with memory.phase("after"):
        pass


def test_tensors_that_share_storage_count_once_and_whole():
    # 10 fp32 = 40 bytes, seen through two views; 3 int64 = 24; 5 bf16 = 10.
    base = torch.zeros(10)
    tensors = [
        base,
        base[2:4],
        base.view(5, 2),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(5, dtype=torch.bfloat16),
    ]
    assert count_tensor_bytes(tensors) == 40 + 24 + 10
    # A view keeps its whole storage alive, even alone.
    assert count_tensor_bytes([base[:1]]) == 40
    assert count_tensor_bytes([]) == 0
    assert count_tensor_bytes([base.clone(), base]) == 80


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_peaks_belong_to_their_phase():
    memory = PhaseMemory()
    torch.zeros(1, device="cuda")
    with memory.phase("large"):
        torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")
    with memory.phase("small"):
        torch.zeros(MIB, dtype=torch.uint8, device="cuda")
    measured = memory.as_dict()
    assert measured["large"]["cuda_peak_allocated_bytes"] >= 64 * MIB
    assert measured["small"]["cuda_peak_allocated_bytes"] < 8 * MIB
    assert memory.metrics()["memory/cuda_peak_allocated_bytes"] >= 64 * MIB
