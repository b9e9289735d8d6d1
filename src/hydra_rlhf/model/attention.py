"""Attention that keeps keys and values as they are (not repeated per query head) and shares one mask over all layers.

Registered with transformers under the name `NAME`. On the CPU (and on meta tensors, where memory is planned) it is the
fused kernel of torch, which reads grouped keys and values in place; elsewhere transformers' own `sdpa` attention.
"""

from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask

NAME = "hydra_rlhf"

FUSED_DEVICES = ("cpu", "meta")
HALF = (torch.bfloat16, torch.float16)
TILE_BYTES = 8 * 2**20
"""What is cast to float32 at a time."""
NOT_FUSED = ("position_bias", "s_aux", "softcap", "cache")
"""Arguments of single families that the fused kernel knows nothing of."""


def attend(
    module: nn.Module,
    query: Float[Tensor, "b h q d"],
    key: Float[Tensor, "b g k d"],
    value: Float[Tensor, "b g k d"],
    attention_mask: Float[Tensor, "#b #h q k"] | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "b q h d"], None]:
    """softmax(scaling * Q K^T + mask) V for h query heads on g groups of keys and values.

    Kept for backward: query, key, value, output and one number per query and head.
    """
    known = all(kwargs.get(name) is None for name in NOT_FUSED) and dropout == 0.0
    if query.device.type not in FUSED_DEVICES or not known or key.shape != value.shape:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    shared_mask = attention_mask is None or attention_mask.shape[1] == 1
    if attention_mask is not None:
        attention_mask = attention_mask.expand(len(query), -1, -1, -1)
    if query.shape[2] == 1 and shared_mask and not torch.is_grad_enabled():
        return attend_once(query, key, value, attention_mask, scaling or query.shape[-1] ** -0.5), None
    causal = attention_mask is None and query.shape[2] > 1 and bool(getattr(module, "is_causal", True))
    wide = query.dtype in HALF and shared_mask and torch.is_grad_enabled()
    flash = WideBackward.apply if wide else flash_attention
    output, _ = flash(dense(query), dense(key), dense(value), attention_mask, causal, scaling)
    return output.transpose(1, 2), None


def attend_once(
    query: Float[Tensor, "b h 1 d"],
    key: Float[Tensor, "b g k d"],
    value: Float[Tensor, "b g k d"],
    mask: Float[Tensor, "b 1 1 k"] | None,
    scaling: float,
) -> Float[Tensor, "b 1 h d"]:
    """Attention of one query to a row, as a decode step has it: two batched products over the groups, in float32.

    The fused kernel is made for many queries. With one, at 16 and 64 rows of 81 columns in groups of three heads, this
    takes 0.85 and 0.67 x its time in float32, 0.19 and 0.14 x in bfloat16 (two cores of a CPU with units for it).
    """
    (b, h, _, d), g = query.shape, key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    size = max(1, TILE_BYTES // (2 * key[0].numel() * dtype.itemsize))
    grouped = query.reshape(b, g, h // g, d)
    outputs: list[Tensor] = []
    for start in range(0, b, size):
        tile = slice(start, start + size)
        scores = (grouped[tile].to(dtype) @ key[tile].to(dtype).mT).mul_(scaling)
        if mask is not None:
            scores += mask[tile]
        outputs.append((scores.softmax(dim=-1) @ value[tile].to(dtype)).to(query.dtype))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).view(b, 1, h, d)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scaling: float | None
) -> tuple[Float[Tensor, "b h q d"], Float[Tensor, "b h q"]]:
    """The fused kernel's output and the logarithm of what each query's softmax was divided by."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scaling
    )


class WideBackward(torch.autograd.Function):
    """The fused kernel on half-precision tensors with a backward in float32, a tile of rows or groups at a time.

    Its own backward on half-precision tensors takes 2.3 x as long as on float32 ones.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scaling: float | None
    ) -> tuple[Tensor, Tensor]:
        """As `flash_attention`."""
        output, log_normaliser = flash_attention(query, key, value, mask, causal, scaling)
        ctx.save_for_backward(query, key, value, output, log_normaliser, mask)
        ctx.causal, ctx.scaling = causal, scaling
        ctx.mark_non_differentiable(log_normaliser)
        return output, log_normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of query, key and value."""
        query, key, value, output, log_normaliser, mask = ctx.saved_tensors
        gradients = tuple(torch.empty_like(x) for x in (query, key, value))
        (b, h), g = query.shape[:2], key.shape[1]
        # In float32 of a group: four tensors of the queries' size and four of the keys', gradients included.
        group_bytes = 4 * (4 * query[0, : h // g].numel() + 4 * key[0, :1].numel())
        num_rows = max(1, TILE_BYTES // (g * group_bytes))
        num_groups = g if g * group_bytes <= TILE_BYTES else max(1, TILE_BYTES // group_bytes)
        for row, group in product(range(0, b, num_rows), range(0, g, num_groups)):
            rows = slice(row, row + num_rows)
            heads = (rows, slice(group * (h // g), (group + num_groups) * (h // g)))
            groups = (rows, slice(group, group + num_groups))
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient[heads].float(),
                query[heads].float(),
                key[groups].float(),
                value[groups].float(),
                output[heads].float(),
                log_normaliser[heads],
                0.0,
                ctx.causal,
                attn_mask=None if mask is None else mask[rows].float(),
                scale=ctx.scaling,
            )
            for whole, part, at in zip(gradients, found, (heads, groups, groups), strict=True):
                whole[at] = part
        return *gradients, None, None, None


def dense(x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """`x` with neighbouring entries of a head side by side, which the kernel asks for; no copy where they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)
