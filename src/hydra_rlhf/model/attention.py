"""Attention that keeps keys and values as they are (not repeated per query head) and shares one mask over all layers.

Registered with transformers under the name `NAME`. On the CPU (and on meta tensors, where memory is planned) it is the
fused kernel of torch, which reads grouped keys and values in place; elsewhere transformers' own `sdpa` attention.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask

NAME = "hydra_rlhf"

FUSED_DEVICES = ("cpu", "meta")
NOT_FUSED = ("position_bias", "s_aux", "softcap", "cache")
"""Arguments of single families that the fused kernel knows nothing of."""


def attend(
    module: nn.Module,
    query: Float[Tensor, "b h q d"],
    key: Float[Tensor, "b g k d"],
    value: Float[Tensor, "b g k d"],
    attention_mask: Float[Tensor, "b 1 q k"] | None,
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
    causal = attention_mask is None and query.shape[2] > 1 and bool(getattr(module, "is_causal", True))
    output, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        dense(query), dense(key), dense(value), 0.0, causal, attn_mask=attention_mask, scale=scaling
    )
    return output.transpose(1, 2), None


def dense(x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """`x` with neighbouring entries of a head side by side, which the kernel asks for; no copy where they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)
