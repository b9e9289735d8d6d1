"""What makes torch repeat a run bit for bit."""

import os

import torch
import torch.utils.deterministic


def ask_for_determinism(wanted: bool) -> None:
    """Ask torch for deterministic kernels, or no longer."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    # warn_only: a few CUDA kernels have no deterministic form at all; on the CPU nothing is left to warn of.
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    # Nothing here reads memory before it is written, so it need not be filled: a tenth of a decode step's time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore
