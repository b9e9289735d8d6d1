"""What a stage may hold at once, and what happens where that is too much: the limit is halved and the work redone.

A memory knob only. Losses are sums divided by the counts of the whole minibatch and each response draws from its own
random stream, so what is redone in smaller parts gives the same loss, the same gradients and the same responses.
"""

import ctypes
import gc
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import torch

from hydra_rlhf.config import OptimizerConfig, PPOConfig, PreferenceConfig
from hydra_rlhf.errors import OutOfMemoryError
from hydra_rlhf.records import TokenBatch

DEFAULT_MICRO_BATCH_TOKENS = 8192
"""Padded tokens per forward where neither a setting nor a memory plan says otherwise."""
OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""How a plain `RuntimeError` says it; the CUDA allocator has a class of its own."""

Rows = TypeVar("Rows", bound=Sized)
Result = TypeVar("Result")
Seen = TypeVar("Seen")


@dataclass(slots=True, kw_only=True)
class StageLimits:
    """What a stage holds at once. Limits only ever shrink, and belong to the state that a resumed run takes up."""

    micro_batch_tokens: int
    """Padded tokens per forward."""
    rollout_rows: int | None = None
    """Responses decoded together; None = the whole batch."""
    kept_graphs: int = 1
    """Micro-batches of a joined pass whose graphs wait for the values of all rows."""
    num_retries: int = 0
    """Times memory ran out and a limit was halved."""

    @classmethod
    def of(cls, config: OptimizerConfig) -> "StageLimits":
        """The limits a stage's settings name, and without a memory plan the defaults for the rest."""
        rows = None
        if isinstance(config, PPOConfig):
            # An evaluation has more prompts than a rollout batch; it must not hold more than one.
            rows = config.sampling.batch_rows or config.rollout_batch_size * config.samples_per_prompt
        if isinstance(config, PreferenceConfig):
            rows = config.num_eval_prompts
        return cls(micro_batch_tokens=config.micro_batch_tokens or DEFAULT_MICRO_BATCH_TOKENS, rollout_rows=rows)

    def at_most(self, other: "StageLimits") -> "StageLimits":
        """These limits where they are the smaller ones, else the other's: what a run that is taken up may hold."""
        rows = [rows for rows in (self.rollout_rows, other.rollout_rows) if rows is not None]
        return replace(
            self,
            micro_batch_tokens=min(self.micro_batch_tokens, other.micro_batch_tokens),
            rollout_rows=min(rows, default=None),
            kept_graphs=min(self.kept_graphs, other.kept_graphs),
        )

    def halve_micro_batch(self, num_items: int, num_tokens: int, reason: str) -> None:
        """Make micro-batches small enough to cut one of `num_items` sequences (or pairs), `num_tokens` when padded.

        Raises `OutOfMemoryError` where that is a single one.
        """
        if num_items == 1:
            raise OutOfMemoryError(
                f"memory ran out on a micro-batch of a single sequence or pair of {num_tokens} tokens, which cannot be "
                "cut further; set memory.checkpointing=layers, name what is really free in memory.budget, or lower "
                f"data.max_prompt_tokens, data.max_response_tokens or ppo.sampling.max_response_tokens ({reason})"
            )
        self.micro_batch_tokens = num_tokens // 2  # not of the limit, which no batch may have come near
        self.num_retries += 1

    def keep_fewer_graphs(self, num_kept: int) -> None:
        """Let half as many graphs wait as the `num_kept` that failed; there were at least two."""
        self.kept_graphs = num_kept // 2
        self.num_retries += 1

    def halve_rollout_rows(self, num_rows: int, reason: str) -> None:
        """Decode half as many rows together as the `num_rows` that failed. Raises `OutOfMemoryError` for one row."""
        if num_rows == 1:
            raise OutOfMemoryError(
                "memory ran out while a single response was sampled; lower ppo.sampling.max_response_tokens and "
                f"data.max_prompt_tokens, or choose a smaller or quantised base ({reason})"
            )
        self.rollout_rows = num_rows // 2
        self.num_retries += 1

    def metrics(self) -> dict[str, float]:
        """The limits in force, for the log."""
        numbers = {"memory/retries": self.num_retries, "memory/micro_batch_tokens": self.micro_batch_tokens}
        if self.rollout_rows is not None:
            numbers["memory/rollout_rows"] = self.rollout_rows
        return {key: float(number) for key, number in numbers.items()}


def map_micro_batches(
    limits: StageLimits,
    cut: Callable[[int], Iterable[tuple[Rows, TokenBatch]]],
    work: Callable[[Rows, TokenBatch], Result],
    *,
    start_over: Callable[[], None] = lambda: None,
) -> list[Result]:
    """`work` on every micro-batch of `cut(max tokens)`, in order.

    Where memory runs out the limit is halved and all of them are done again: what comes out is what a run with the
    smaller limit gives. `start_over` drops what `work` has left elsewhere by then, its gradients.
    """
    while True:
        results: list[Result] = []
        failure = None
        for rows, micro_batch in cut(limits.micro_batch_tokens):
            result = attempt(work, rows, micro_batch)
            if isinstance(result, MemoryFailure):
                failure = (len(rows), micro_batch.tokens.numel(), result.reason)
                break
            results.append(result)
        if failure is None:
            return results
        results.clear()
        start_over()
        gc.collect()
        release()
        limits.halve_micro_batch(*failure)


def learn_after_looking(
    limits: StageLimits,
    cut: Callable[[int], Iterable[tuple[Rows, TokenBatch]]],
    look: Callable[[Rows, TokenBatch], Seen],
    between: Callable[[], None],
    learn: Callable[[Rows, TokenBatch, Seen], Result],
    *,
    forget: Callable[[], None],
) -> list[Result]:
    """`look` at every micro-batch, `between`, then `learn` from each and from what was seen in it, the last one first.

    The last `limits.kept_graphs` of them are looked at with gradients enabled and learned from as they were seen. The
    others are looked at once more when they are learned from, so that no more graphs than these exist at once. Where
    memory runs out fewer graphs wait, then micro-batches are halved, and all is done again; `forget` drops gradients.
    """
    while True:
        parts = list(cut(limits.micro_batch_tokens))
        done = look_then_learn(parts, limits.kept_graphs, look, between, learn)
        if isinstance(done, list):
            return done
        forget()
        gc.collect()
        release()
        (rows, micro_batch), reason = done
        num_kept = min(limits.kept_graphs, len(parts))
        if num_kept > 1:
            limits.keep_fewer_graphs(num_kept)
        else:
            limits.halve_micro_batch(len(rows), micro_batch.tokens.numel(), reason)


def look_then_learn(
    parts: Sequence[tuple[Rows, TokenBatch]],
    num_kept: int,
    look: Callable[[Rows, TokenBatch], Seen],
    between: Callable[[], None],
    learn: Callable[[Rows, TokenBatch, Seen], Result],
) -> list[Result] | tuple[tuple[Rows, TokenBatch], str]:
    """The work of `learn_after_looking`; or the micro-batch that memory ran out on, and what the allocator said."""
    kept: list[Seen] = []
    results: list[Result] = []
    for number, part in enumerate(parts):
        keeps = number >= len(parts) - num_kept
        with torch.set_grad_enabled(keeps):
            seen = attempt(look, *part)
        if isinstance(seen, MemoryFailure):
            kept.clear()  # whoever holds the error may hold this frame
            return part, seen.reason
        if keeps:
            kept.append(seen)
        del seen
    between()

    def learn_from(rows: Rows, micro_batch: TokenBatch) -> Result:
        return learn(rows, micro_batch, kept.pop() if kept else look(rows, micro_batch))

    for part in reversed(parts):
        result = attempt(learn_from, *part)
        if isinstance(result, MemoryFailure):
            kept.clear()
            return part, result.reason
        results.append(result)
    return results


def finish_rows(limits: StageLimits, num_rows: int, work: Callable[[int], None]) -> None:
    """`work(rows)` until it succeeds, on at most `limits.rollout_rows` of `num_rows` rows at a time.

    Where memory runs out the limit is halved and `work` called again; what it had finished by then stays finished.
    """
    while True:
        size = min(limits.rollout_rows or num_rows, num_rows)
        result = attempt(work, size)
        if not isinstance(result, MemoryFailure):
            return
        gc.collect()
        release()
        limits.halve_rollout_rows(size, result.reason)


@dataclass(frozen=True, slots=True)
class MemoryFailure:
    """An attempt that memory did not suffice for."""

    reason: str
    """What the allocator said, its first line."""


def attempt(work: Callable[..., Result], *arguments: Any) -> Result | MemoryFailure:
    """What `work` returns, or that memory ran out; then nothing that `work` held is alive through the error."""
    try:
        return work(*arguments)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        link: BaseException | None = error
        while link is not None:  # frames of the error's traceback hold every tensor of the forward that failed
            traceback.clear_frames(link.__traceback__)
            link = link.__cause__ or link.__context__
        return MemoryFailure(reason)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that host or device memory did not suffice."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


def release() -> None:
    """Hand back what no tensor holds: CUDA's cached blocks to the device, free pages of the C heap to the system."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`; other C libraries have none and need none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
