"""A second copy of frozen weights in the layout that the CPU's bfloat16 units read, while responses are sampled.

oneDNN multiplies in tiles. It lays a plain matrix out in tiles again at every product, which is two fifths of what the
products of a decode step take; a copy that is laid out once gives the same bits. Only where the memory plan says that a
rollout with the copy stays below the largest phase: docs/decisions/0024-a-second-layout-where-it-raises-no-peak.md.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hydra_rlhf.model import device

TILE = (64, 32)
"""Rows and columns that a packed matrix is filled up to multiples of."""
PACKED = "packed"
"""The attribute of a weight that holds its copy."""


def can_pack(device_type: str, dtype: torch.dtype) -> bool:
    """Whether products with weights of this kind are faster with a packed copy."""
    there = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and torch.backends.mkldnn.is_available()
    return there and device_type == "cpu" and dtype == torch.bfloat16 and device.has_bfloat16_units(torch.device("cpu"))


def packable(linears: Iterable[nn.Module], head: Tensor, device_type: str) -> list[Tensor]:
    """What a decode step reads of these linears and of the LM head's weight, as far as it can be packed."""
    plain = [linear.weight for linear in linears if type(linear) is nn.Linear]
    return [weight for weight in (*plain, head) if can_pack(device_type, weight.dtype)]


def packed_bytes(weight: Float[Tensor, "o i"]) -> int:
    """Bytes of a packed copy."""
    return weight.element_size() * prod(-(-size // tile) * tile for size, tile in zip(weight.shape, TILE, strict=True))


@contextmanager
def packed(weights: Iterable[Tensor]) -> Iterator[None]:
    """Copies of these weights exist inside the block, and `packed_product` uses them. Weights must not change."""
    done: list[Tensor] = []
    try:
        for weight in weights:
            setattr(weight, PACKED, torch.ops.mkldnn._reorder_linear_weight(weight.detach()))
            done.append(weight)
        yield
    finally:
        for weight in done:
            delattr(weight, PACKED)


def packed_product(
    x: Float[Tensor, "*n i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None
) -> Float[Tensor, "*n o"] | None:
    """x W^T + b by the weight's packed copy; None where there is none."""
    copy = getattr(weight, PACKED, None)
    return None if copy is None else torch.ops.mkldnn._linear_pointwise(x, copy, bias, "none", [], "")
