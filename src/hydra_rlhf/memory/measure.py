"""Bytes held by tensors, and by the process as the run measures it (`runtime/measure.py`, which a `Run` needs)."""

from collections.abc import Iterable

from torch import Tensor

from hydra_rlhf.runtime.measure import PhaseMemory as PhaseMemory
from hydra_rlhf.runtime.measure import peak_rss_bytes as peak_rss_bytes
from hydra_rlhf.runtime.measure import rss_bytes as rss_bytes


def count_tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that `tensors` hold, each storage counted once and whole, however many tensors are views of it."""
    storages = {(tensor.device, tensor.untyped_storage().data_ptr()): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
