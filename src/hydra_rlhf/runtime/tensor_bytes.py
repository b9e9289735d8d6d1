"""Exact bytes of all tensors of a device while a block runs, by watching every operation (also on meta tensors)."""

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdRef


class TensorBytes(TorchDispatchMode):
    """Counts the storages that operations make on one kind of device, each once and whole, until they die.

    `live` is what is held now, `peak` the most since the start or the last `restart`. What an operation takes and gives
    back within itself is not seen. Slow (tens of microseconds an operation): for measuring, not for training.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._device_type = device_type
        self._known: dict[weakref.ref[Any], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and take its outputs into account."""
        output = func(*args, **(kwargs or {}))
        self.hold(x for x in tree_iter(output) if isinstance(x, Tensor))
        return output

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count these tensors too, e.g. weights that were there before."""
        for tensor in tensors:
            if tensor.device.type != self._device_type:
                continue
            if tensor.is_mkldnn:  # a packed weight, which has no storage that torch knows
                reference, num_bytes = WeakIdRef(tensor, self._gone), torch.ops.mkldnn._nbytes(tensor)
            else:
                storage = tensor.untyped_storage()
                reference, num_bytes = weakref.ref(storage, self._gone), storage.nbytes()
            self.live += num_bytes - self._known.get(reference, 0)
            self._known[reference] = num_bytes
        self.peak = max(self.peak, self.live)

    def hold_existing(self) -> None:
        """Count every tensor that Python holds now."""
        gc.collect()
        # The type is asked and not the object: some objects are proxies that run code when they are looked at.
        tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
        self.hold(x for x in tensors if x.layout == torch.strided)

    def restart(self) -> None:
        """Begin a new peak at what is held now."""
        self.peak = self.live

    def _gone(self, reference: Any) -> None:
        self.live -= self._known.pop(reference, 0)


def existing_bytes(device_type: str = "cpu") -> int:
    """Bytes of every tensor of the device that Python holds now: what a measurement did not make."""
    count = TensorBytes(device_type)
    count.hold_existing()
    return count.live
