"""Passes of a few layers run on meta tensors, and the bytes they need: the very code that trains, without a number."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hydra_rlhf.model.cache import PreallocatedCache, PreallocatedLayer
from hydra_rlhf.model.heads import ScalarHead
from hydra_rlhf.model.logprobs import token_logprobs
from hydra_rlhf.model.trunk import Trunk
from hydra_rlhf.runtime.tensor_bytes import TensorBytes

ADAPTER = "planned"
"""Name of the LoRA set on the trunks that are run."""

Bytes = tuple[float, float]
"""(kept, at the peak)."""


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


def counting(trunk: Trunk) -> TensorBytes:
    """A count that knows the trunk's own tensors, so that views of them are no news."""
    count = TensorBytes("meta")
    count.hold([*trunk.parameters(), *trunk.buffers()])
    return count


def run_layers(trunk: Trunk, kind: PassKind, rows: Rows) -> Bytes:
    """Bytes (kept by forward, at the peak) of the layers; a learning pass runs twice, as the first makes gradients."""
    trunk.requires_grad_(False)
    if kind.learns:
        trained = trunk.adapter_parameters(ADAPTER) if kind.adapter else trunk.base_parameters()
        for parameter in trained.values():
            parameter.requires_grad_(True)
    kept = before = 0
    with counting(trunk) as count, torch.set_grad_enabled(kind.learns):
        for _ in range(1 + kind.learns):
            before = count.live
            count.restart()
            tokens = torch.zeros(rows.num, rows.prompt + rows.response, dtype=torch.long, device="meta")
            mask = torch.ones(tokens.shape, dtype=torch.bool, device="meta")
            hidden = trunk.hidden_states(tokens, mask, adapter=ADAPTER if kind.adapter else None)
            kept = count.live - before
            if kind.learns:
                gradient = torch.empty_like(hidden)
                hidden.backward(gradient)
                del gradient
            del hidden, tokens, mask
    for parameter in trunk.parameters():
        parameter.grad = None
    return kept, count.peak - before


def run_lm_head(trunk: Trunk, kind: PassKind, rows: Rows, vocab: int, temperature: float, tile_bytes: int) -> float:
    """Most bytes of log-probs of all response tokens, forward and backward, with a head of `vocab` columns."""
    real = trunk.lm_head
    with TensorBytes("meta") as count, torch.set_grad_enabled(kind.learns):
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
        if kind.learns:
            (logprobs.sum() + entropy.sum() if kind.entropy_gradient else logprobs.sum()).backward()
        return count.peak - before


def run_scalar_heads(trunk: Trunk, kind: PassKind, rows: Rows) -> float:
    """As `run_lm_head`, of a value head on all response tokens or a reward head on the last."""
    head = ScalarHead(trunk.hidden_size).to("meta").requires_grad_(kind.learns)
    with TensorBytes("meta") as count, torch.set_grad_enabled(kind.learns):
        count.hold(head.parameters())
        hidden = hidden_leaf(trunk, kind, rows)
        before = count.live
        read = [hidden[:, rows.prompt - 1 : -1]] * kind.value_head + [hidden[:, -1]] * kind.reward_head
        outputs = [head(states).sum() for states in read]
        if outputs and kind.learns:
            torch.stack(outputs).sum().backward()
        return count.peak - before


def hidden_leaf(trunk: Trunk, kind: PassKind, rows: Rows) -> Tensor:
    """Hidden states that the layers left, as the heads see them."""
    shape = (rows.num, rows.prompt + rows.response, trunk.hidden_size)
    return torch.empty(shape, dtype=trunk.dtype, device="meta").requires_grad_(kind.learns)


@torch.no_grad()
def run_rollout(trunk: Trunk, rows: Rows, *, adapter: bool) -> Bytes:
    """Bytes (of the cache, at the peak) of the prefill of all prompts and of the last decode step, the cache full."""
    name = ADAPTER if adapter else None
    width = rows.prompt + rows.response
    with counting(trunk) as count:
        before = count.live
        cache = PreallocatedCache(width)
        tokens = torch.zeros(rows.num, rows.prompt, dtype=torch.long, device="meta")
        mask = torch.ones(tokens.shape, dtype=torch.bool, device="meta")
        trunk.hidden_states(tokens, mask, adapter=name, cache=cache)
        for layer in cache.layers:
            assert isinstance(layer, PreallocatedLayer)
            keys, values = (x[..., :1, :] for x in layer.filled)
            rest = rows.response - 1
            layer.update(keys.expand(*keys.shape[:-2], rest, -1), values.expand(*values.shape[:-2], rest, -1))
        mask = torch.ones(rows.num, width, dtype=torch.bool, device="meta")
        trunk.hidden_states(tokens[:, :1], mask, adapter=name, cache=cache)
        return cache.num_bytes, count.peak - before
