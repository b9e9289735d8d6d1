"""Keys and values of a rollout, in storage that is allocated once and written in place.

A cache that grows by concatenation holds a layer twice at each step, and leaves the allocator blocks of every length.
Here rows share one moving column: decoding writes all of them there, and the prompts of rows that join later are laid
to the left of it, so that to a model every batch looks like one that was padded on the left.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(slots=True)
class Joining:
    """Rows whose prompts a pass computes, and where their keys and values go."""

    rows: Int[Tensor, " n"]
    sources: Int[Tensor, " n"]
    """Which prompt of the pass each of `rows` gets."""
    stop: int
    """The column behind the prompts' last."""


@dataclass(slots=True)
class Fixed:
    """A decode step whose shapes do not change from one to the next."""

    at: Int[Tensor, ""]
    """The column that is written."""
    width: int
    """Columns that are read, from the first one on; a mask hides those that are not there yet."""


@dataclass(slots=True)
class Columns:
    """What all layers of a cache share."""

    num_columns: int
    num_rows: int | None
    """None = as many as the first keys have."""
    start: int = 0
    """The first column in use."""
    joining: Joining | None = None
    fixed: Fixed | None = None


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values for a known number of columns; `keys` and `values` are views of those in use.

    What it tells the mask makers is what `DynamicLayer` tells them: every column in use can be seen, and a model's own
    sliding window is left to its mask.
    """

    def __init__(self, columns: Columns) -> None:
        super().__init__()
        self._columns = columns
        self.stop = 0
        """The column behind the last in use."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate, in the shapes that the first keys and values have; families differ in them.

        Zeros, since what a mask hides is multiplied all the same, by zero.
        """
        self.dtype, self.device = key_states.dtype, key_states.device
        num_rows = self._columns.num_rows or len(key_states)
        self._key_store, self._value_store = (
            states.new_zeros((num_rows, *states.shape[1:-2], self._columns.num_columns, states.shape[-1]))
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self,
        key_states: Float[Tensor, "*b n d"],
        value_states: Float[Tensor, "*b n e"],
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[Float[Tensor, "*b k d"], Float[Tensor, "*b k e"]]:
        """Write new columns behind those in use; keys and values of all in use, as views.

        Rows that join see their own prompts alone.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        joining = self._columns.joining
        if joining is not None:
            self.stop = joining.stop
            columns = slice(joining.stop - key_states.shape[-2], joining.stop)
            self._key_store[joining.rows, ..., columns, :] = key_states[joining.sources]
            self._value_store[joining.rows, ..., columns, :] = value_states[joining.sources]
            return key_states, value_states
        fixed = self._columns.fixed
        if fixed is not None:
            self._key_store.index_copy_(-2, fixed.at[None], key_states)
            self._value_store.index_copy_(-2, fixed.at[None], value_states)
            return self._key_store[..., : fixed.width, :], self._value_store[..., : fixed.width, :]
        start, self.stop = self.stop, self.stop + key_states.shape[-2]
        num_columns = self._columns.num_columns
        assert self.stop <= num_columns, f"{self.stop} columns in a cache of {num_columns}"
        self._key_store[..., start : self.stop, :] = key_states
        self._value_store[..., start : self.stop, :] = value_states
        return self._set_views()

    def get_seq_length(self) -> int:
        """Columns in use; none to rows that join, all but the last in a step of fixed shapes."""
        if self._columns.fixed is not None:
            return self._columns.fixed.width - 1
        return 0 if self._columns.joining is not None or not self.is_initialized else self.stop - self._columns.start

    def batch_select_indices(self, indices: Int[Tensor, " n"]) -> None:
        """Keep these rows and move them together at the front of the same storage."""
        if self.is_initialized:
            self._key_store = self._moved_together(self._key_store, indices)
            self._value_store = self._moved_together(self._value_store, indices)
            self._set_views()

    def shift_left(self, num_columns: int) -> None:
        """Move what is in use over free columns on its left."""
        if self.is_initialized:
            used = slice(self._columns.start, self.stop)
            moved = slice(used.start - num_columns, used.stop - num_columns)
            for store in (self._key_store, self._value_store):
                store[..., moved, :] = store[..., used, :].clone()
        self.stop -= num_columns

    @property
    def num_bytes(self) -> int:
        """Bytes allocated, whether filled or not."""
        stores = (self._key_store, self._value_store) if self.is_initialized else ()
        return sum(store.untyped_storage().nbytes() for store in stores)

    def _moved_together(self, store: Float[Tensor, "*b k d"], rows: Int[Tensor, " n"]) -> Float[Tensor, "*n k d"]:
        used = store[..., self._columns.start : self.stop, :]
        used[: len(rows)] = used[rows]  # what is copied on the way is one layer's keys or values at a time
        return store[: len(rows)]

    def _set_views(self) -> tuple[Tensor, Tensor]:
        self.keys = self._key_store[..., self._columns.start : self.stop, :]
        self.values = self._value_store[..., self._columns.start : self.stop, :]
        return self.keys, self.values


class PreallocatedCache(DynamicCache):
    """A `DynamicCache` for sequences within `num_columns` columns whose layers never grow.

    `num_rows` is how many rows there will be at most; None = those of the first keys.
    """

    def __init__(self, num_columns: int, num_rows: int | None = None) -> None:
        super().__init__()
        self.columns = Columns(num_columns, num_rows)
        self.layer_class_to_replicate = partial(PreallocatedLayer, self.columns)  # pyright: ignore

    @contextmanager
    def joining(self, rows: Int[Tensor, " n"], sources: Int[Tensor, " n"], stop: int) -> Iterator[None]:
        """Inside the block a pass over prompts fills `rows`, each with what prompt `sources[i]` of the pass gives.

        The prompts' last column is the one before `stop`, from which decoding goes on for all rows.
        """
        self.columns.joining = Joining(rows, sources, stop)
        try:
            yield
        finally:
            self.columns.joining = None

    @contextmanager
    def fixed(self, at: Int[Tensor, ""], width: int) -> Iterator[None]:
        """Inside the block a decode step writes column `at` and reads the first `width`; its mask hides some."""
        self.columns.fixed = Fixed(at, width)
        try:
            yield
        finally:
            self.columns.fixed = None

    def use_columns(self, start: int, stop: int) -> None:
        """These columns are in use, whatever was written last."""
        self.columns.start = start
        for layer in self.layers:
            layer.stop = stop  # pyright: ignore[reportAttributeAccessIssue]

    def drop_before(self, column: int) -> None:
        """No row needs what lies left of `column`: it is no longer in use."""
        self.columns.start = column

    def shift_left(self, num_columns: int) -> None:
        """Move the columns in use to the left, over columns that nobody needs."""
        assert num_columns <= self.columns.start, f"{num_columns} columns asked for, {self.columns.start} are free"
        for layer in self.layers:
            layer.shift_left(num_columns)  # pyright: ignore
        self.columns.start -= num_columns

    @property
    def num_bytes(self) -> int:
        """Bytes allocated by all layers."""
        return sum(layer.num_bytes for layer in self.layers if isinstance(layer, PreallocatedLayer))
