"""Log-prob and entropy of tokens straight from their hidden states, with logits that live one tile at a time.

A tile is some tokens x some of the vocabulary. Forward folds tiles into running statistics of each token and keeps
those; backward makes every tile again. Why and at what price: docs/decisions/0009-logits-in-tiles.md.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from hydra_rlhf.model.heads import LMHead
from hydra_rlhf.model.online_softmax import LogitShaping, RunningSoftmax

TILE_ASPECT = 8
"""Columns per row of a tile, where both have room. Every vocabulary tile adds to the float32 gradient of its tokens'
states (some 12 bytes per entry are moved), every token tile reads the head once more (2 bytes in half precision)."""
COLUMN_MULTIPLE = 64
"""Matrix products are at their best on such widths."""


def tiled_logprobs(
    head: LMHead,
    states: Float[Tensor, "n h"],
    targets: Int[Tensor, " n"],
    *,
    temperature: float,
    entropy_gradient: bool,
    tile_bytes: int,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Log-prob of each target and entropy of each distribution, in float32 at least.

    At most two tiles live at once, in forward and in backward; a tile counts `tile_bytes` as float32. For backward are
    kept: the states, the targets and four numbers per token. A frozen head costs no gradient product.
    """
    shaping = LogitShaping(scale=head.scale, softcap=head.softcap, temperature=temperature)
    shape = tile_shape(len(targets), len(head.weight), tile_bytes)
    return TiledLogprobs.apply(  # pyright: ignore[reportReturnType]
        states, head.weight, head.bias, targets, shaping, shape, entropy_gradient
    )


def tile_shape(num_tokens: int, vocab_size: int, tile_bytes: int) -> tuple[int, int]:
    """(tokens, columns) of the largest tile; 4 x tokens x columns <= tile_bytes, and at least one entry."""
    entries = max(1, tile_bytes // 4)
    columns = min(vocab_size, entries, math.isqrt(TILE_ASPECT * entries))
    num_tiles = max(1, math.ceil(num_tokens / (entries // columns)))
    # Of even heights: a last tile of a few tokens would cost as many reads of the head as a full one.
    rows = max(1, math.ceil(num_tokens / num_tiles))
    columns = min(vocab_size, entries // rows)
    if COLUMN_MULTIPLE < columns < vocab_size:
        columns -= columns % COLUMN_MULTIPLE
    return rows, columns


def spans(length: int, step: int) -> Iterator[slice]:
    """Slices of at most `step` that cover 0 to `length`."""
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def product(a: Float[Tensor, "i k"], b: Float[Tensor, "k j"]) -> Float[Tensor, "i j"]:
    """a @ b in the dtype of the head and the states, which b has; the result is not rounded to it, but float32.

    On CUDA the tensor cores read half precision and write float32. The CPU's half-precision product can only round its
    result, and is slow without special instructions: there one tile's share of states and head is widened at a time.
    Tensors without numbers (meta) are treated as on the CPU, so that a memory plan is on the safe side.
    """
    wide = torch.promote_types(b.dtype, torch.float32)
    if b.dtype != wide and b.is_cuda:
        return torch.mm(a.to(b.dtype), b, out_dtype=wide)
    return torch.mm(a.to(wide), b.to(wide))


@contextmanager
def narrow_units() -> Iterator[None]:
    """Inside, the CPU multiplies float32 matrices on its bfloat16 units, if it has any, and sums in float32.

    For numbers that were bfloat16 before they were widened: then every product is exact. It takes 0.65 x the time.
    """
    matmul = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def widened(weight: Float[Tensor, "c h"]) -> Float[Tensor, "c h"]:
    """A part of the head as `product` wants it: float32 at least on the CPU, made once for all tiles that read it."""
    return weight if weight.is_cuda else weight.to(torch.promote_types(weight.dtype, torch.float32))


def add_product_(total: Float[Tensor, "i j"], a: Float[Tensor, "i k"], b: Float[Tensor, "k j"]) -> None:
    """total += a @ b, summed in total's dtype: float32 at least."""
    if b.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(product(a, b))


def fold_for(tile: Tensor) -> Callable[[RunningSoftmax, Tensor, Tensor, LogitShaping], Any]:
    """How a tile is folded in: by the Triton kernel on CUDA where Triton works, else in plain torch."""
    if tile.is_cuda and tile.dtype == torch.float32 and find_spec("triton") is not None:
        from hydra_rlhf.model.triton_fold import fold_in_one_read, works_on

        if works_on(tile.device):
            return fold_in_one_read
    return RunningSoftmax.fold_


class TiledLogprobs(torch.autograd.Function):
    """(states, weight, bias, targets) -> (logprobs, entropy), one tile of logits at a time.

    The vocabulary is the outer loop: a trained head's gradient is then complete in float32 one vocabulary tile at a
    time, whatever dtype the head has.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Float[Tensor, "n h"],
        weight: Float[Tensor, "v h"],
        bias: Float[Tensor, " v"] | None,
        targets: Int[Tensor, " n"],
        shaping: LogitShaping,
        shape: tuple[int, int],
        entropy_gradient: bool,
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Fold every tile into the statistics of its tokens."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        softmax = RunningSoftmax.empty(len(targets), dtype=wide, device=states.device)
        for vocabulary in spans(len(weight), shape[1]):
            columns = widened(weight[vocabulary])
            for tokens in spans(len(targets), shape[0]):
                fold_tile(
                    states[tokens],
                    columns,
                    None if bias is None else bias[vocabulary],
                    targets[tokens] - vocabulary.start,
                    softmax.rows(tokens),
                    shaping,
                    weight.dtype,
                )
        ctx.save_for_backward(
            states, weight, bias, targets, softmax.peak, softmax.total, softmax.weighted, softmax.target_logit
        )
        ctx.plan = (shaping, shape, entropy_gradient)
        logprobs, entropy = softmax.logprobs(), softmax.entropy()
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_logprobs: Float[Tensor, " n"], grad_entropy: Float[Tensor, " n"]
    ) -> tuple[Tensor | None, ...]:
        """Make every tile again and add up what it gives to the gradients that are asked for, in float32 at least."""
        states, weight, bias, targets, *statistics = ctx.saved_tensors
        shaping, shape, entropy_gradient = ctx.plan
        wants_states, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        softmax = RunningSoftmax(*statistics)
        wide = softmax.total.dtype
        into_states = states.new_zeros(states.shape, dtype=wide) if wants_states else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        into_bias = weight.new_zeros(len(weight), dtype=wide) if wants_bias else None
        for vocabulary in spans(len(weight), shape[1]):
            columns = widened(weight[vocabulary])
            into_weight = None if grad_weight is None else grad_weight[vocabulary].to(wide)  # a view where it is wide
            for tokens in spans(len(targets), shape[0]):
                unfold_tile(
                    states[tokens],
                    columns,
                    None if bias is None else bias[vocabulary],
                    targets[tokens] - vocabulary.start,
                    softmax.rows(tokens),
                    shaping,
                    weight.dtype,
                    grad_logprobs[tokens],
                    grad_entropy[tokens] if entropy_gradient else None,
                    into_states=None if into_states is None else into_states[tokens],
                    into_weight=into_weight,
                    into_bias=None if into_bias is None else into_bias[vocabulary],
                )
            if grad_weight is not None and into_weight is not None and grad_weight.dtype != wide:
                grad_weight[vocabulary] = into_weight
        grad_states = None if into_states is None else into_states.to(states.dtype)
        grad_bias = None if into_bias is None else into_bias.to(weight.dtype)
        return grad_states, grad_weight, grad_bias, None, None, None, None


def raw_tile(
    states: Float[Tensor, "n h"], weight: Float[Tensor, "c h"], bias: Float[Tensor, " c"] | None, dtype: torch.dtype
) -> Float[Tensor, "n c"]:
    """The head's products of some tokens and some of the vocabulary, in float32 at least.

    `weight` is `widened`; `dtype` is what it had before.
    """
    narrow = states.device.type == "cpu" and states.dtype == dtype == torch.bfloat16
    with narrow_units() if narrow else nullcontext():
        tile = product(states, weight.T)
    return tile if bias is None else tile.add_(bias)


def fold_tile(
    states: Float[Tensor, "n h"],
    weight: Float[Tensor, "c h"],
    bias: Float[Tensor, " c"] | None,
    targets: Int[Tensor, " n"],
    softmax: RunningSoftmax,
    shaping: LogitShaping,
    dtype: torch.dtype,
) -> None:
    """Make one tile and fold it into its tokens' statistics. A function of its own, so that the tile dies with it."""
    tile = raw_tile(states, weight, bias, dtype)
    fold_for(tile)(softmax, tile, targets, shaping)


def unfold_tile(
    states: Float[Tensor, "n h"],
    weight: Float[Tensor, "c h"],
    bias: Float[Tensor, " c"] | None,
    targets: Int[Tensor, " n"],
    softmax: RunningSoftmax,
    shaping: LogitShaping,
    dtype: torch.dtype,
    grad_logprobs: Float[Tensor, " n"],
    grad_entropy: Float[Tensor, " n"] | None,
    *,
    into_states: Float[Tensor, "n h"] | None,
    into_weight: Float[Tensor, "c h"] | None,
    into_bias: Float[Tensor, " c"] | None,
) -> None:
    """Make one tile again and add its share to the gradients; None where nobody asks for one."""
    tile = raw_tile(states, weight, bias, dtype)
    gradient = softmax.gradient(tile, targets, shaping, grad_logprobs, grad_entropy)
    del tile
    if into_states is not None:
        add_product_(into_states, gradient, weight)
    if into_weight is not None:
        add_product_(into_weight, gradient.T, states)
    if into_bias is not None:
        into_bias.add_(gradient.sum(dim=0))
