"""Decoding in steps of fixed shapes, which a CUDA graph repeats without a call from the host for every kernel.

A small model's decode step is a few thousand kernels of some microseconds: launching them takes longer than they do.
In a graph all of them are launched at once. What may change between two steps is in tensors that stay where they are,
and the number of columns that a step reads grows by `BUCKET`. On other devices the same steps run as they are.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hydra_rlhf.model.sampling import Sampling, refusal
from hydra_rlhf.model.slots import Slots, decode
from hydra_rlhf.model.trunk import Trunk, text_config

BUCKET = 64
"""Columns by which what a step reads grows; each number of them has a graph of its own."""
WARM_UPS = 2
"""Steps that run before one is captured, so that libraries have allocated what they keep."""


class FixedSlots(Slots):
    """Slots whose steps have fixed shapes: nobody leaves the batch, and what is not needed is masked."""

    def __init__(self, sampling: Sampling, num_slots: int) -> None:
        super().__init__(sampling, num_slots)
        check_window(sampling.trunk, self.cache.columns.num_columns)
        device = self.starts.device
        self.at = torch.zeros((), dtype=torch.long, device=device)
        """`column`, where the device reads it."""
        self.first_needed = 0
        """Columns left of this one are read by no running row."""
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def step(self, *, keep_room: bool) -> None:
        """As that of `Slots`."""
        num_columns = self.cache.columns.num_columns
        if self.column == num_columns:
            self._shift(keep_room=keep_room)
        width = min(num_columns, -(-(self.column + 1) // BUCKET) * BUCKET)
        self.at.fill_(self.column)
        if self.at.is_cuda:
            if width not in self._graphs:
                self._graphs[width] = self._capture(width)
            self._graphs[width].replay()
        else:
            self._step(width)
        self.column += 1
        self.num_drawn = [number + 1 for number in self.num_drawn]

    def _step(self, width: int) -> None:
        """One step on the first `width` columns; nothing here depends on a number that the host knows and changes."""
        columns = torch.arange(width, device=self.starts.device)
        seen = (columns >= self.starts[:, None]) & (columns <= self.at)
        with self.cache.fixed(self.at, width):
            hidden = self.sampling.trunk.hidden_states(
                self.drawn[:, None], seen, adapter=self.sampling.adapter, cache=self.cache
            )
        self._draw(hidden[:, -1], slice(None), ())

    def _capture(self, width: int) -> torch.cuda.CUDAGraph:
        """The graph of a step; what running it for warming up changes is put back."""
        kept = self._changed()
        before = [tensor.clone() for tensor in kept]

        def put_back() -> None:
            for tensor, old in zip(kept, before, strict=True):
                tensor.copy_(old)

        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                self._step(width)
                put_back()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            self._step(width)
        put_back()
        return graph

    def _changed(self) -> list[Tensor]:
        """All that a step writes to, but for columns of the cache that it will write again."""
        sampling = self.sampling
        own = [self.drawn, self.running, self.steps, self.finite]
        return [*own, sampling.tokens, sampling.logprobs, sampling.num_tokens, sampling.ended]

    def compact(self) -> None:
        """Rows that have ended stay, since the batch keeps its size; their draws go where nobody reads them."""

    def drop_columns(self) -> None:
        """Note what is free; a step reads from the first column on."""
        firsts = [first for first, row in zip(self.first_column, self.rows, strict=True) if row is not None]
        self.first_needed = min(firsts, default=self.first_needed)

    def _shift(self, *, keep_room: bool) -> None:
        self.cache.use_columns(self.first_needed, self.column)
        super()._shift(keep_room=keep_room)
        self.cache.use_columns(0, self.column)
        self.drop_columns()


def check_window(trunk: Trunk, num_columns: int) -> None:
    """Raise `ModelError` for attention that looks back less far than a rollout is wide: masks count from the end."""
    window = getattr(text_config(trunk.model.config), "sliding_window", None)
    if window is not None and window < num_columns:
        raise refusal(f"attention looks back {window} tokens, and a rollout has {num_columns} columns", engine="graphs")


decode_in_graphs = partial(decode, kind=FixedSlots)
"""Finish all rows of a sampling that are not finished; an engine as `slots.decode`."""
