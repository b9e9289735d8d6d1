"""From a budget to settings: the cheapest micro-batch, row group and checkpointing that a plan says will fit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil

from hydra_rlhf.memory.plan import Cuts, Phases, peak
from hydra_rlhf.model.device import CALL_TOKENS

MAX_MICRO_BATCH_TOKENS = 8192
"""Larger forwards are no faster: the products are long past the size that keeps a device busy."""
FORWARD_BACKWARD = 3.0
"""Time of forward and backward in forwards, with a frozen base: input gradients cost one forward, LoRA and attention
most of another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What the settings leave no choice about; None = choose."""

    micro_batch_tokens: int | None = None
    rollout_rows: int | None = None
    checkpointed_layers: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to cut the work, what it needs and what it costs."""

    cuts: Cuts
    phases: Phases
    relative_time: float
    """Of an update, against one whole micro-batch without checkpointing."""

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return peak(self.phases)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What has to be cut, and what a plan says about each way to cut it."""

    plan: Callable[[Cuts], Phases]
    given: Given
    num_layers: int
    num_sequences: int
    tokens_each: int
    """Of a sequence."""
    held: int = 0
    """Bytes that are there however it is cut; where they are too many, nothing else has to be tried."""
    keeps_graphs: bool = False
    """Micro-batches may wait with their graphs for the values of all rows, which saves their second forward."""
    num_decoded: int | None = None
    """Responses that are to be decoded; None = as many as sequences."""


def choose(work: Work, budget: int) -> tuple[Option | None, list[Option]]:
    """(the cheapest option within `budget` bytes or None, every option looked at).

    Rows decoded together are as many as fit. For each size of micro-batch as few layers as possible are checkpointed.
    The last option looked at is the smallest there is, whether it fits or not.
    """
    given = work.given
    layers = given.checkpointed_layers or 0  # a rollout recomputes nothing; what is asked for here is needed anyway
    num_decoded = work.num_decoded or work.num_sequences
    groups = row_groups(num_decoded, given.rollout_rows) if work.held <= budget else ()
    rows = next((rows for rows in groups if rollout_bytes(work.plan, rows, layers) <= budget), given.rollout_rows or 1)
    num_tokens = work.num_sequences * work.tokens_each
    options = [
        fewest_layers(work, budget, tokens=tokens, rows=rows)
        for tokens in micro_batch_sizes(num_tokens, work.tokens_each, given.micro_batch_tokens)
    ]
    fitting = [option for option in options if option.peak <= budget]
    found = min(fitting, key=lambda option: option.relative_time, default=None)
    if found is not None and work.keeps_graphs:
        place, found = options.index(found), most_graphs(work, budget, found)
        options[place] = found
    return found, options


def most_graphs(work: Work, budget: int, option: Option) -> Option:
    """The option with as many graphs kept as fit, of all its micro-batches at most."""
    for kept in range(ceil(work.num_sequences / max(1, option.cuts.micro_batch_tokens // work.tokens_each)), 1, -1):
        cuts = replace(option.cuts, kept_graphs=kept)
        phases = work.plan(cuts)
        if peak(phases) <= budget:
            return replace(option, cuts=cuts, phases=phases)
    return option


def fits_smallest(work: Work, budget: int) -> bool:
    """Whether the smallest parts that work can be cut into fit; then `choose` finds an option."""
    if work.held > budget:
        return False
    layers = work.num_layers if work.given.checkpointed_layers is None else work.given.checkpointed_layers
    cuts = Cuts(
        micro_batch_tokens=work.given.micro_batch_tokens or work.tokens_each,
        rollout_rows=work.given.rollout_rows or 1,
        checkpointed_layers=layers,
    )
    return peak(work.plan(cuts)) <= budget


def rollout_bytes(plan: Callable[[Cuts], Phases], rows: int, layers: int) -> int:
    """What decoding this many rows together needs; 0 in a plan without a rollout (stage 1)."""
    phases = plan(Cuts(micro_batch_tokens=1, rollout_rows=rows, checkpointed_layers=layers))
    return sum(phases["rollout"].values()) if "rollout" in phases else 0


def fewest_layers(work: Work, budget: int, *, tokens: int, rows: int) -> Option:
    """The option with this micro-batch that checkpoints the fewest layers within the budget (by bisection)."""
    given, num_layers = work.given, work.num_layers

    def option(layers: int) -> Option:
        cuts = Cuts(micro_batch_tokens=tokens, rollout_rows=rows, checkpointed_layers=layers)
        return Option(cuts=cuts, phases=work.plan(cuts), relative_time=relative_time(tokens, layers / num_layers))

    if given.checkpointed_layers is not None:
        return option(given.checkpointed_layers)
    low, high = 0, num_layers
    if work.held > budget:
        return option(high)
    if option(low).peak <= budget:
        return option(low)
    while high - low > 1:
        middle = (low + high) // 2
        if option(middle).peak <= budget:
            high = middle
        else:
            low = middle
    return option(high)


def relative_time(tokens: int, checkpointed_share: float) -> float:
    """Time of an update per token, against large micro-batches without checkpointing."""
    return (1.0 + checkpointed_share / FORWARD_BACKWARD) * (1.0 + CALL_TOKENS / tokens)


def micro_batch_sizes(num_tokens: int, tokens_each: int, given: int | None) -> Iterator[int]:
    """Sizes to look at, largest first: halves of the most that is useful, down to a single sequence."""
    if given is not None:
        yield given
        return
    size = max(min(MAX_MICRO_BATCH_TOKENS, num_tokens), tokens_each)
    while size > tokens_each:
        yield size
        size //= 2
    yield tokens_each


def row_groups(num_sequences: int, given: int | None) -> Iterator[int]:
    """Sizes of row groups to look at: the whole batch in 1, 2, 4, ... groups."""
    if given is not None:
        yield given
        return
    num_groups = 1
    while num_groups < num_sequences:
        yield ceil(num_sequences / num_groups)
        num_groups *= 2
    yield 1
