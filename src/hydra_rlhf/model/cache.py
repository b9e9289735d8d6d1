"""Keys and values of a rollout, in storage that is allocated once and written in place.

A cache that grows by concatenation holds a layer twice at each step, and leaves the allocator blocks of every length.
"""

from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


def cache_bytes(
    *, num_rows: int, num_columns: int, num_layers: int, num_kv_heads: int, head_dim: int, itemsize: int
) -> int:
    """Bytes of the keys and values of `num_rows` sequences of at most `num_columns` tokens, prompt included."""
    return 2 * num_layers * num_rows * num_kv_heads * num_columns * head_dim * itemsize


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values for a known number of columns; `keys` and `values` are views of the filled part.

    What it tells the mask makers is what `DynamicLayer` tells them: every column so far can be seen, and a model's own
    sliding window is left to its mask.
    """

    def __init__(self, num_columns: int) -> None:
        super().__init__()
        self._num_columns = num_columns
        self._num_filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate, in the shapes that the first keys and values have; families differ in them."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._key_store = key_states.new_empty((*key_states.shape[:-2], self._num_columns, key_states.shape[-1]))
        self._value_store = value_states.new_empty(
            (*value_states.shape[:-2], self._num_columns, value_states.shape[-1])
        )
        self.is_initialized = True

    def update(
        self,
        key_states: Float[Tensor, "*b n d"],
        value_states: Float[Tensor, "*b n e"],
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[Float[Tensor, "*b k d"], Float[Tensor, "*b k e"]]:
        """Write new columns behind the filled ones; all keys and values so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self._num_filled = self._num_filled, self._num_filled + key_states.shape[-2]
        assert self._num_filled <= self._num_columns, f"{self._num_filled} columns in a cache of {self._num_columns}"
        self._key_store[..., start : self._num_filled, :] = key_states
        self._value_store[..., start : self._num_filled, :] = value_states
        return self._set_views()

    def batch_select_indices(self, indices: Int[Tensor, " n"]) -> None:
        """Keep these rows and move them together at the front of the same storage."""
        if self.is_initialized:
            self._key_store = self._moved_together(self._key_store, indices)
            self._value_store = self._moved_together(self._value_store, indices)
            self._set_views()

    @property
    def filled(self) -> tuple[Tensor, Tensor]:
        """Keys and values so far."""
        return self._set_views()

    @property
    def num_bytes(self) -> int:
        """Bytes allocated, whether filled or not."""
        stores = (self._key_store, self._value_store) if self.is_initialized else ()
        return sum(store.untyped_storage().nbytes() for store in stores)

    def _moved_together(self, store: Float[Tensor, "*b k d"], rows: Int[Tensor, " n"]) -> Float[Tensor, "*n k d"]:
        filled = store[..., : self._num_filled, :]
        filled[: len(rows)] = filled[rows]  # what is copied on the way is one layer's keys or values at a time
        return store[: len(rows)]

    def _set_views(self) -> tuple[Tensor, Tensor]:
        self.keys = self._key_store[..., : self._num_filled, :]
        self.values = self._value_store[..., : self._num_filled, :]
        return self.keys, self.values


class PreallocatedCache(DynamicCache):
    """A `DynamicCache` for sequences of at most `num_columns` tokens whose layers never grow."""

    def __init__(self, num_columns: int) -> None:
        super().__init__()
        self.layer_class_to_replicate = partial(PreallocatedLayer, num_columns)  # pyright: ignore

    @property
    def num_bytes(self) -> int:
        """Bytes allocated by all layers."""
        return sum(layer.num_bytes for layer in self.layers if isinstance(layer, PreallocatedLayer))
