"""Decoding on the training weights in slots: rows that have ended leave, and waiting rows take their place."""

from collections import deque
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hydra_rlhf.errors import NonFiniteError
from hydra_rlhf.model.cache import PreallocatedCache
from hydra_rlhf.model.sampling import Sampling

COMPACT_BELOW = 0.75
"""With nothing waiting, ended rows leave the batch when fewer than this share of its rows still run."""
REFILL_FROM = 1 / 8
"""Waiting rows join when this share of the slots is free: a few prompts in one pass, and few slots that idle."""
LOOK_EVERY = {"cpu": 1}
"""Steps between two looks at which rows have ended, by device; a look waits for the device."""
LOOK_EVERY_ELSEWHERE = 8
SHORTER = 0.75
"""Prompts below this share of the longest of their pass start a pass of their own."""
MIN_PASS_TOKENS = 512
"""Passes over prompts are not cut below this."""


@torch.no_grad()
def decode(sampling: Sampling, num_slots: int, *, kind: "type[Slots] | None" = None) -> None:
    """Finish all rows that are not finished, at most `num_slots` at a time, on one cache, in slots of some kind."""
    sampling.start_over()
    waiting = deque(sampling.left())
    if not waiting:
        return
    slots = (kind or Slots)(sampling, min(num_slots, len(waiting)))
    look_every = LOOK_EVERY.get(sampling.prompts.device.type, LOOK_EVERY_ELSEWHERE)
    slots.join([waiting.popleft() for _ in range(len(slots.rows))])
    since = 0
    while True:
        sampling.after_token()
        since += 1
        if since >= look_every or slots.any_at_limit():
            slots.look(since)
            since = 0
            free = slots.free()
            if waiting and (len(free) >= REFILL_FROM * len(slots.rows) or len(free) == len(slots.rows)):
                slots.join([waiting.popleft() for _ in range(min(len(free), len(waiting)))])
                continue
            if len(free) == len(slots.rows):
                return
            if not waiting and len(slots.rows) - len(free) < COMPACT_BELOW * len(slots.rows):
                slots.compact()
        slots.step(keep_room=bool(waiting))


class Slots:
    """Rows that are decoded together; all write their next keys and values to one column of the cache.

    Lists are what this process knows without asking the device.
    """

    def __init__(self, sampling: Sampling, num_slots: int) -> None:
        self.sampling = sampling
        device = sampling.prompts.device
        self.width = max(sampling.prompt_tokens[row] for row in sampling.left())
        """Columns that the longest prompt needs."""
        self.cache = PreallocatedCache(self.width + sampling.limit, num_slots)
        self.column = self.width
        """Where the next keys and values go."""
        self.rows: list[int | None] = [None] * num_slots
        """The row in each slot; None once it has ended."""
        self.first_column = [0] * num_slots
        """Where each row's prompt begins."""
        self.num_drawn = [0] * num_slots
        self.row_of = torch.zeros(num_slots, dtype=torch.long, device=device)
        self.starts = torch.zeros(num_slots, dtype=torch.long, device=device)
        self.steps = torch.zeros(num_slots, dtype=torch.long, device=device)
        self.running = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self.drawn = torch.zeros(num_slots, dtype=torch.long, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    def free(self) -> list[int]:
        """Slots whose rows have ended."""
        return [slot for slot, row in enumerate(self.rows) if row is None]

    def any_at_limit(self) -> bool:
        """Whether some row must have ended by now."""
        limit = self.sampling.limit
        return any(n >= limit for n, row in zip(self.num_drawn, self.rows, strict=True) if row is not None)

    def join(self, rows: Sequence[int]) -> None:
        """Put these rows into free slots: a pass over their prompts, each once, and the first draw of each."""
        free = self.free()
        if len(free) == len(self.rows):  # nobody needs the columns so far
            self.column = self.width
        taken = free[: len(rows)]
        for slot, row in zip(taken, rows, strict=True):
            self.rows[slot], self.num_drawn[slot] = row, 0
            self.first_column[slot] = self.column - self.sampling.prompt_tokens[row]
        self.drop_columns()
        for part in self._passes(taken):
            self._prefill(part)

    def _passes(self, slots: Sequence[int]) -> list[list[int]]:
        """Slots cut into passes over prompts of similar lengths; rows come longest prompt first."""
        lengths = {slot: self.column - self.first_column[slot] for slot in slots}
        parts: list[list[int]] = [[]]
        for slot in slots:
            part = parts[-1]
            if part and lengths[slot] < SHORTER * lengths[part[0]] and len(part) * lengths[part[0]] >= MIN_PASS_TOKENS:
                parts.append([])
            parts[-1].append(slot)
        return parts

    def _prefill(self, slots: Sequence[int]) -> None:
        sampling, device = self.sampling, self.row_of.device
        rows = [row for row in (self.rows[slot] for slot in slots) if row is not None]
        same = sampling.same_prompt or range(len(sampling.finished))
        leaders: dict[int, int] = {}
        for row in rows:
            leaders.setdefault(same[row], row)
        place = {prompt: i for i, prompt in enumerate(leaders)}
        prompts = list(leaders.values())
        width = max(sampling.prompt_tokens[row] for row in prompts)
        sources = torch.tensor([place[same[row]] for row in rows], device=device)
        index = torch.tensor(slots, device=device)
        with self.cache.joining(index, sources, self.column):
            hidden = sampling.trunk.hidden_states(
                sampling.prompts[prompts, -width:],
                sampling.prompt_mask[prompts, -width:],
                adapter=sampling.adapter,
                cache=self.cache,
            )
            # Of the prompts' states only the last ones stay: the others are read by nobody.
            states = hidden[:, -1][sources]
            del hidden
        self.row_of[index] = torch.tensor(rows, device=device)
        self.starts[index] = torch.tensor([self.first_column[slot] for slot in slots], device=device)
        self.steps[index] = 0
        self.running[index] = True
        self._draw(states, index, slots)

    def step(self, *, keep_room: bool) -> None:
        """One decode step of all slots. With `keep_room` the longest prompt still fits left of the column after it."""
        if self.column == self.cache.columns.num_columns:
            self._shift(keep_room=keep_room)
        columns = torch.arange(self.cache.columns.start, self.column + 1, device=self.starts.device)
        hidden = self.sampling.trunk.hidden_states(
            self.drawn[:, None], columns >= self.starts[:, None], adapter=self.sampling.adapter, cache=self.cache
        )
        self.column += 1
        self._draw(hidden[:, -1], slice(None), range(len(self.rows)))

    def _draw(self, states: Float[Tensor, "n h"], index: Int[Tensor, " n"] | slice, slots: Iterable[int]) -> None:
        """One token in each of `slots`, which `index` selects."""
        self.drawn[index], self.running[index], finite = self.sampling.draw(
            self.row_of[index], self.steps[index], self.running[index], states
        )
        self.finite &= finite
        self.steps[index] += 1
        for slot in slots:
            self.num_drawn[slot] += 1

    def look(self, since: int) -> None:
        """Ask the device which rows have ended in the last `since` steps; they leave their slots."""
        running, finite = self.running.tolist(), self.finite.item()
        if not finite:
            raise NonFiniteError(
                "the model's logits are not finite, so nothing can be sampled; its weights are damaged"
            )
        for slot, row in enumerate(self.rows):
            if row is None:
                continue
            if self.sampling.ends_in_string(row, self.num_drawn[slot] - since - 1) or not running[slot]:
                self.sampling.finished[row] = True
                self.rows[slot], running[slot] = None, False
        self.running.copy_(torch.tensor(running))
        self.drop_columns()

    def drop_columns(self) -> None:
        """Read the cache from where the first running row begins."""
        firsts = [first for first, row in zip(self.first_column, self.rows, strict=True) if row is not None]
        self.cache.drop_before(min(firsts, default=self.cache.columns.start))

    def compact(self) -> None:
        """Rows that have ended leave the batch."""
        kept = [slot for slot, row in enumerate(self.rows) if row is not None]
        index = torch.tensor(kept, device=self.starts.device)
        self.cache.batch_select_indices(index)
        for name in ("row_of", "starts", "steps", "running", "drawn"):
            setattr(self, name, getattr(self, name)[index])
        for name in ("rows", "first_column", "num_drawn"):
            values = getattr(self, name)
            setattr(self, name, [values[slot] for slot in kept])

    def _shift(self, *, keep_room: bool) -> None:
        """Make room for another column, over columns that no running row needs."""
        num = self.cache.columns.start
        if keep_room:
            num = min(num, self.column - self.width)
        self.cache.shift_left(num)
        self.column -= num
        self.first_column = [first - num for first in self.first_column]
        self.starts.sub_(num).clamp_(min=0)
