"""Passes of a few layers run on meta tensors, and the bytes they need: the very code that trains, without a number."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hydra_rlhf.memory.course import Course
from hydra_rlhf.model.cache import PreallocatedCache, PreallocatedLayer
from hydra_rlhf.model.heads import ScalarHead
from hydra_rlhf.model.logprobs import token_logprobs
from hydra_rlhf.model.trunk import Trunk
from hydra_rlhf.runtime.meta_ops import KnownShapes, MetaBytes

ADAPTER = "planned"
"""Name of the LoRA set on the trunks that are run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The shape of a (micro-)batch."""

    num: int
    prompt: int
    """Prompt columns."""
    response: int
    """Response columns."""

    @property
    def tokens(self) -> int:
        """Padded tokens."""
        return self.num * (self.prompt + self.response)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassKind:
    """What decides how much one pass over the trunk needs, besides the shape of its batch."""

    adapter: bool = False
    """A LoRA set is on."""
    learns: bool = False
    """Backward runs too: through the LoRA set where one is on, else through all weights."""
    lm_head: bool = False
    """The LM head reads the response tokens."""
    value_head: bool = False
    """A value head reads them."""
    reward_head: bool = False
    """A reward head reads the last state of each row."""
    half: bool = False
    """The LM head reads half of the rows: the chosen ones of pairs."""
    entropy_gradient: bool = False
    """The entropy is part of the loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadBytes:
    """What heads need on top of the hidden states that they read."""

    kept: float
    """Live when they have run forward: what their backward needs, and what they said."""
    peak: float
    """Most, forward and backward."""

    def towards(self, other: "HeadBytes", steps: float) -> "HeadBytes":
        """So many times the way from here to the other, on a straight line."""
        return HeadBytes(
            kept=self.kept + (other.kept - self.kept) * steps, peak=self.peak + (other.peak - self.peak) * steps
        )


def run_layers(trunk: Trunk, kind: PassKind, rows: Rows, period: int, known: KnownShapes) -> Course:
    """The course of the layers alone, forward and, where they learn, backward beside gradients of an earlier pass."""
    trunk.requires_grad_(False)
    trained = {}
    if kind.learns:
        trained = trunk.adapter_parameters(ADAPTER) if kind.adapter else trunk.base_parameters()
    for parameter in trained.values():
        parameter.requires_grad_(True)
        parameter.grad = torch.empty_like(parameter)
    with watched(trunk, period, known) as watch, torch.set_grad_enabled(kind.learns):
        tokens = torch.zeros(rows.num, rows.prompt + rows.response, dtype=torch.long, device="meta")
        mask = torch.ones(tokens.shape, dtype=torch.bool, device="meta")
        hidden = trunk.hidden_states(tokens, mask, adapter=ADAPTER if kind.adapter else None)
        watch.course.kept = watch.now
        if kind.learns:
            gradient = torch.empty_like(hidden)
            hidden.backward(gradient)
    for parameter in trained.values():
        parameter.grad = None
    return watch.course


@torch.no_grad()
def run_rollout(trunk: Trunk, rows: Rows, *, adapter: bool, period: int, known: KnownShapes) -> Course:
    """The course of the prefill of all prompts and of the last decode step, the cache full."""
    name = ADAPTER if adapter else None
    width = rows.prompt + rows.response
    with watched(trunk, period, known) as watch, trunk.switch.fixed():
        cache = PreallocatedCache(width, rows.num)
        tokens = torch.zeros(rows.num, rows.prompt, dtype=torch.long, device="meta")
        mask = torch.ones(tokens.shape, dtype=torch.bool, device="meta")
        every = torch.arange(rows.num, device="meta")
        with cache.joining(every, every, rows.prompt):
            trunk.hidden_states(tokens, mask, adapter=name, cache=cache)
        for layer in cache.layers:
            assert isinstance(layer, PreallocatedLayer)
            layer.stop = width - 1
        mask = torch.ones(rows.num, width, dtype=torch.bool, device="meta")
        watch.decoding = True
        trunk.hidden_states(tokens[:, :1], mask, adapter=name, cache=cache)
        watch.course.made = trunk.switch.made_bytes
        watch.course.kept = cache.num_bytes + watch.course.made
    return watch.course


class Watch:
    """Notes, while a pass runs, when it comes to the last layers, and when its backward leaves them."""

    def __init__(self, count: MetaBytes, layers: list[nn.Module], period: int) -> None:
        self.course = Course()
        self.decoding = False
        """The cache of all layers is there; nothing more is noted."""
        self._count = count
        self._before = count.live
        count.restart()
        self._first = len(layers) - period
        self._period = period
        self._at: dict[int, int] = {}
        """Bytes when the pass came to a layer."""

    @property
    def now(self) -> int:
        """Bytes that the pass holds at this moment."""
        return self._count.live - self._before

    def enters(self, layer: int, hidden: Tensor) -> None:
        """The pass comes to a layer with these states."""
        if self.decoding:
            return
        self._at[layer] = self.now
        if layer == self._first:
            self.course.deep = range(len(self._count.moments), 0)
            if hidden.requires_grad:
                hidden.register_hook(self._leaves)

    def _leaves(self, gradient: Tensor) -> None:
        del gradient
        self.course.deep = range(self.course.deep.start, len(self._count.moments))

    def finish(self) -> None:
        """Make the course."""
        self.course.moments = [moment - self._before for moment in self._count.moments]
        if not self.course.deep and self._first in self._at:  # no backward came by
            self.course.deep = range(self.course.deep.start, len(self.course.moments))
        last = self._first + self._period - 1
        if last - self._period in self._at:
            self.course.per_layer = (self._at[last] - self._at[last - self._period]) / self._period


@contextmanager
def watched(trunk: Trunk, period: int, known: KnownShapes) -> Iterator[Watch]:
    """A watch over passes of a trunk whose layers repeat after `period`; what the trunk itself holds is no news."""
    layers = trunk.layers()
    count = MetaBytes(known)
    count.hold([*trunk.parameters(), *trunk.buffers(), *(p.grad for p in trunk.parameters() if p.grad is not None)])
    watch = Watch(count, layers, period)
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, i=i: watch.enters(i, args[0] if args else kwargs["hidden_states"]),  # noqa: ARG005
            with_kwargs=True,
        )
        for i, layer in enumerate(layers)
    ]
    try:
        with count:
            yield watch
    finally:
        for hook in hooks:
            hook.remove()
    watch.finish()


def run_lm_head(
    trunk: Trunk,
    kind: PassKind,
    rows: Rows,
    vocab: int,
    *,
    temperature: float,
    tile_bytes: int,
    known: KnownShapes,
) -> HeadBytes:
    """Bytes of log-probs of all response tokens, forward and backward, with a head of `vocab` columns."""
    real = trunk.lm_head
    with MetaBytes(known) as count, torch.set_grad_enabled(kind.learns):
        trained = kind.learns and not kind.adapter
        weight = torch.empty((vocab, real.weight.shape[1]), dtype=real.weight.dtype, device="meta")
        head = replace(
            real, weight=weight.requires_grad_(trained), bias=None if real.bias is None else real.bias[:vocab]
        )
        hidden = hidden_leaf(trunk, kind, rows)
        before = count.live
        states = hidden[:, rows.prompt - 1 : -1].reshape(-1, hidden.shape[-1])
        logprobs, entropy = token_logprobs(
            head,
            states,
            torch.zeros(len(states), dtype=torch.long, device="meta"),
            temperature=temperature,
            entropy_gradient=kind.entropy_gradient,
            tile_bytes=tile_bytes,
        )
        del states
        kept = count.live - before
        if kind.learns:
            (logprobs.sum() + entropy.sum() if kind.entropy_gradient else logprobs.sum()).backward()
        return HeadBytes(kept=kept, peak=count.peak - before)


def run_scalar_heads(trunk: Trunk, kind: PassKind, rows: Rows, known: KnownShapes) -> HeadBytes:
    """As `run_lm_head`, of a value head on all response tokens or a reward head on the last."""
    head = ScalarHead(trunk.hidden_size).to("meta").requires_grad_(kind.learns)
    with MetaBytes(known) as count, torch.set_grad_enabled(kind.learns):
        count.hold(head.parameters())
        hidden = hidden_leaf(trunk, kind, rows)
        before = count.live
        read = [hidden[:, rows.prompt - 1 : -1]] * kind.value_head + [hidden[:, -1]] * kind.reward_head
        outputs = [head(states).sum() for states in read]
        kept = count.live - before
        if outputs and kind.learns:
            torch.stack(outputs).sum().backward()
        return HeadBytes(kept=kept, peak=count.peak - before)


def hidden_leaf(trunk: Trunk, kind: PassKind, rows: Rows) -> Tensor:
    """Hidden states that the layers left, as the heads see them."""
    shape = (rows.num, rows.prompt + rows.response, trunk.hidden_size)
    return torch.empty(shape, dtype=trunk.dtype, device="meta").requires_grad_(kind.learns)
