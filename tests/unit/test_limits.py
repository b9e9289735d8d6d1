"""Limits of a stage and what happens where memory runs out: halved, redone, the same result, nothing left alive."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from hydra_rlhf.config import HydraSFTConfig, PPOConfig, SamplingConfig
from hydra_rlhf.errors import OutOfMemoryError
from hydra_rlhf.records import TokenBatch
from hydra_rlhf.runtime.measure import rss_bytes
from hydra_rlhf.stages import limits

ENOMEM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore advice")


def stage_limits(tokens: int = 64, rows: int | None = None) -> limits.StageLimits:
    """Limits without history."""
    return limits.StageLimits(micro_batch_tokens=tokens, rollout_rows=rows)


def cut_rows(num_rows: int, width: int):
    """A cut of rows of one width: as many as the limit holds in each micro-batch, at least one."""

    def cut(max_tokens: int):
        size = max(1, max_tokens // width)
        for start in range(0, num_rows, size):
            rows = list(range(start, min(start + size, num_rows)))
            ones = torch.ones(len(rows), width, dtype=torch.bool)
            yield rows, TokenBatch(tokens=ones.long(), attention_mask=ones, response_mask=ones[:, 1:])

    return cut


def raised(work, *arguments) -> Exception | None:
    """What a call raises."""
    try:
        work(*arguments)
    except Exception as error:
        return error
    return None


# --- where limits come from -----------------------------------------------------------------------------------------


def test_settings_win_and_what_they_leave_open_has_a_default():
    named = limits.StageLimits.of(PPOConfig(micro_batch_tokens=100, sampling=SamplingConfig(batch_rows=5)))
    assert (named.micro_batch_tokens, named.rollout_rows, named.num_retries) == (100, 5, 0)
    # 8 prompts x 2 samples: an evaluation of 256 prompts holds no more at once than a rollout.
    unset = limits.StageLimits.of(PPOConfig(rollout_batch_size=8, samples_per_prompt=2, minibatch_size=4))
    assert (unset.micro_batch_tokens, unset.rollout_rows) == (8192, 16)
    stage1 = limits.StageLimits.of(HydraSFTConfig())
    assert (stage1.micro_batch_tokens, stage1.rollout_rows) == (8192, None)


def test_what_is_logged():
    assert stage_limits(64).metrics() == {"memory/retries": 0.0, "memory/micro_batch_tokens": 64.0}
    both = stage_limits(64, 8)
    both.halve_rollout_rows(8, "full")
    assert both.metrics() == {
        "memory/retries": 1.0,
        "memory/micro_batch_tokens": 64.0,
        "memory/rollout_rows": 4.0,
    }


# --- halving --------------------------------------------------------------------------------------------------------


def test_a_micro_batch_that_failed_is_cut():
    # Of a limit of 64, micro-batches of 60 tokens failed: half of those. A limit far above any batch: not half of that.
    for limit, failed, expected in ((64, 60, 30), (64, 64, 32), (8192, 60, 30), (50, 49, 24)):
        held = stage_limits(limit)
        assert raised(held.halve_micro_batch, 2, failed, "full") is None
        assert (held.micro_batch_tokens, held.num_retries) == (expected, 1)


def test_a_single_sequence_cannot_be_cut():
    held = stage_limits(64)
    error = raised(held.halve_micro_batch, 1, 300, "2.00 GiB wanted")
    assert isinstance(error, OutOfMemoryError)
    assert error.exit_code == 1
    for word in ("300 tokens", "memory.checkpointing", "memory.budget", "max_prompt_tokens", "2.00 GiB wanted"):
        assert word in str(error)
    assert held == stage_limits(64)


def test_rows_are_halved_down_to_one():
    held = stage_limits(rows=12)
    for failed, left in ((12, 6), (5, 2), (2, 1)):
        held.halve_rollout_rows(failed, "full")
        assert held.rollout_rows == left
    error = raised(held.halve_rollout_rows, 1, "2.00 GiB wanted")
    assert isinstance(error, OutOfMemoryError)
    assert "max_response_tokens" in str(error)
    assert held.num_retries == 3


# --- what counts as out of memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        ENOMEM,
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory: you tried to"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_errors_that_say_that_memory_ran_out(error):
    assert limits.is_out_of_memory(error)


def test_the_cpu_allocators_own_error():
    error = raised(lambda: torch.empty(2**60, dtype=torch.uint8))
    assert type(error) is RuntimeError
    assert limits.is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("memory")])
def test_other_errors_are_not_swallowed(error):
    assert not limits.is_out_of_memory(error)

    def fail() -> None:
        raise error

    assert raised(limits.attempt, fail) is error


# --- one attempt ----------------------------------------------------------------------------------------------------


def test_an_attempt_returns_what_the_work_returns():
    assert limits.attempt(lambda a, b: a + b, 2, 3) == 5
    assert limits.attempt(lambda: None) is None


def test_a_failed_attempt_keeps_nothing_alive():
    """The tensors of the frames below, of a backward, and of an error that another one led to."""
    alive: list[weakref.ref] = []

    def tensor() -> torch.Tensor:
        made = torch.ones(3, requires_grad=True)
        alive.append(weakref.ref(made))
        return made

    def deep() -> None:
        activation = tensor()
        if activation.sum() > 0:
            raise ENOMEM

    def work() -> None:
        outputs = tensor() * 2
        try:
            deep()
        except RuntimeError as error:
            own = tensor()
            raise MemoryError(f"{own.shape} {outputs.shape}") from error

    gc.disable()
    try:
        failed = limits.attempt(work)
        assert isinstance(failed, limits.MemoryFailure)
        assert failed.reason == "torch.Size([3]) torch.Size([3])"
        assert len(alive) == 3
        assert [reference() for reference in alive] == [None] * 3
    finally:
        gc.enable()


def test_the_reason_is_one_line():
    def fail() -> None:
        raise ENOMEM

    failed = limits.attempt(fail)
    assert isinstance(failed, limits.MemoryFailure)
    assert failed.reason == "CUDA out of memory. Tried to allocate 2.00 GiB."


# --- micro-batches --------------------------------------------------------------------------------------------------


def failing_at(*places: int):
    """Work on micro-batches that says which rows it saw, and runs out of memory at these calls (counted from 0)."""
    seen: list[list[int]] = []

    def work(rows: list[int], micro_batch: TokenBatch) -> tuple[int, ...]:
        assert micro_batch.tokens.shape[0] == len(rows)
        seen.append(rows)
        if len(seen) - 1 in places:
            raise ENOMEM
        return tuple(rows)

    return work, seen


def test_without_trouble_every_micro_batch_is_worked_on_once():
    held = stage_limits(20)
    work, _ = failing_at()
    assert limits.map_micro_batches(held, cut_rows(5, 10), work) == [(0, 1), (2, 3), (4,)]
    assert held == stage_limits(20)
    assert limits.map_micro_batches(held, cut_rows(0, 10), work) == []


def test_after_a_failure_all_is_done_again_in_halves():
    held = stage_limits(40)
    work, seen = failing_at(1)
    dropped: list[int] = []
    results = limits.map_micro_batches(
        held, cut_rows(8, 10), work, start_over=lambda: dropped.append(held.micro_batch_tokens)
    )
    # Rows 0 to 3 were done, 4 to 7 failed; then everything in pairs.
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1], [2, 3], [4, 5], [6, 7]]
    assert results == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert dropped == [40]
    assert (held.micro_batch_tokens, held.num_retries) == (20, 1)


def test_it_may_fail_twice_and_stays_small():
    held = stage_limits(1000)
    work, seen = failing_at(0, 1)
    dropped: list[int] = []
    results = limits.map_micro_batches(held, cut_rows(4, 10), work, start_over=lambda: dropped.append(1))
    # All four are 40 tokens; two are 20; singles are 10.
    assert seen[:2] == [[0, 1, 2, 3], [0, 1]]
    assert results == [(0,), (1,), (2,), (3,)]
    assert len(dropped) == 2
    assert (held.micro_batch_tokens, held.num_retries) == (10, 2)
    again, seen_again = failing_at()
    limits.map_micro_batches(held, cut_rows(2, 10), again)
    assert seen_again == [[0], [1]]


def test_a_single_row_that_fails_ends_it():
    work, seen = failing_at(0)
    dropped: list[int] = []
    error = raised(
        lambda: limits.map_micro_batches(stage_limits(1), cut_rows(3, 10), work, start_over=lambda: dropped.append(1))
    )
    assert isinstance(error, OutOfMemoryError)
    assert seen == [[0]]
    assert dropped == [1]


def test_what_is_dropped_before_the_next_try_is_really_gone():
    """Results of finished micro-batches and the failed one's tensors are dead when the work starts over."""
    alive: list[weakref.ref] = []
    counts: list[int] = []

    def work(rows: list[int], micro_batch: TokenBatch) -> torch.Tensor:
        counts.append(sum(reference() is not None for reference in alive))
        made = torch.ones(2) * len(rows)
        alive.append(weakref.ref(made))
        if len(counts) == 2:
            raise ENOMEM
        return made

    results = limits.map_micro_batches(stage_limits(20), cut_rows(4, 10), work)
    assert [int(result[0]) for result in results] == [1, 1, 1, 1]
    # The second call sees the first's result; the third starts over and sees none.
    assert counts == [0, 1, 0, 1, 2, 3]


# --- looking at all before learning from any ------------------------------------------------------------------------


class Looking:
    """Work in two rounds that writes down what happens, and runs out of memory in these calls of `look` (from 0)."""

    def __init__(self, *places: int) -> None:
        self.places = places
        self.story: list[str] = []
        self.num_looks = 0
        self.alive: list[weakref.ref] = []

    def look(self, rows: list[int], micro_batch: TokenBatch) -> torch.Tensor:
        """A tensor; notes the rows, whether gradients are on, and how many of the tensors before are alive."""
        alive = sum(reference() is not None for reference in self.alive)
        self.story.append(f"look {rows} {'graph' if torch.is_grad_enabled() else 'plain'} {alive}")
        self.num_looks += 1
        seen = micro_batch.tokens.sum()
        self.alive.append(weakref.ref(seen))
        if self.num_looks - 1 in self.places:
            raise ENOMEM
        return seen

    def between(self) -> None:
        """All has been seen."""
        self.story.append("between")

    def learn(self, rows: list[int], micro_batch: TokenBatch, seen: torch.Tensor) -> tuple[int, ...]:
        """The rows, from what was seen in them."""
        assert seen == micro_batch.tokens.numel()
        self.story.append(f"learn {rows}")
        return tuple(rows)

    def forget(self) -> None:
        """Begin anew."""
        self.story.append("forget")

    def run(self, held: limits.StageLimits, num_rows: int = 5) -> list[tuple[int, ...]]:
        """Over rows of 10 tokens."""
        return limits.learn_after_looking(
            held, cut_rows(num_rows, 10), self.look, self.between, self.learn, forget=self.forget
        )


def test_the_last_graphs_wait_and_the_others_are_looked_at_again():
    held = replace(stage_limits(20), kept_graphs=2)
    work = Looking()
    assert work.run(held) == [(4,), (2, 3), (0, 1)]
    # What was only looked at is dead at once; of those kept each dies with its own learning.
    assert work.story == [
        "look [0, 1] plain 0",
        "look [2, 3] graph 0",
        "look [4] graph 1",
        "between",
        "learn [4]",
        "learn [2, 3]",
        "look [0, 1] graph 0",
        "learn [0, 1]",
    ]
    assert held == replace(stage_limits(20), kept_graphs=2)
    single = Looking()
    assert single.run(stage_limits(100)) == [(0, 1, 2, 3, 4)]
    assert single.story == ["look [0, 1, 2, 3, 4] graph 0", "between", "learn [0, 1, 2, 3, 4]"]


def test_graphs_are_given_up_before_micro_batches_are_cut():
    # Limits of 9 graphs are of 3 micro-batches: 3, then 1, then smaller micro-batches; all is done again each time.
    held = replace(stage_limits(20), kept_graphs=9)
    work = Looking(2, 4)
    assert work.run(held) == [(4,), (3,), (2,), (1,), (0,)]
    assert (held.kept_graphs, held.micro_batch_tokens, held.num_retries) == (1, 10, 2)
    assert work.story[:7] == [
        "look [0, 1] graph 0",
        "look [2, 3] graph 1",
        "look [4] graph 2",
        "forget",
        "look [0, 1] plain 0",
        "look [2, 3] plain 0",
        "forget",
    ]
    assert work.story.count("between") == 1


def test_memory_may_run_out_while_learning():
    held = stage_limits(20)
    work = Looking(3)  # the second look at rows 2 and 3
    assert work.run(held) == [(4,), (3,), (2,), (1,), (0,)]
    assert work.story.index("forget") == 6
    assert held.micro_batch_tokens == 10
    assert isinstance(raised(Looking(0).run, stage_limits(20), 1), OutOfMemoryError)


# --- groups of rows -------------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_limit_and_no_more_than_there_are():
    seen: list[int] = []
    for rows in (4, None, 50):
        limits.finish_rows(stage_limits(rows=rows), 10, seen.append)
    assert seen == [4, 10, 10]


def test_rows_shrink_until_they_fit():
    held = stage_limits()
    seen: list[int] = []

    def work(num_rows: int) -> None:
        seen.append(num_rows)
        assert len(seen) < 10, "it should shrink and end"
        if num_rows > 2:
            raise ENOMEM

    limits.finish_rows(held, 16, work)
    assert seen == [16, 8, 4, 2]
    assert (held.rollout_rows, held.num_retries) == (2, 3)
    limits.finish_rows(held, 16, work)
    assert seen[4:] == [2]

    def never(num_rows: int) -> None:
        raise ENOMEM

    assert isinstance(raised(limits.finish_rows, stage_limits(), 4, never), OutOfMemoryError)


# --- handing memory back --------------------------------------------------------------------------------------------


def test_release_hands_free_pages_back():
    """Blocks too small for malloc to map one by one; the last is kept, so that the heap cannot shrink from its end."""
    if limits._malloc_trim() is None:
        pytest.skip("this C library has no malloc_trim")
    size, count = 64 * 1024, 1500
    blocks = [torch.ones(size, dtype=torch.uint8) for _ in range(count)]
    kept = blocks[-1]
    del blocks
    before = rss_bytes()
    limits.release()
    assert before - rss_bytes() > 0.5 * size * count
    assert kept.float().mean() == 1
