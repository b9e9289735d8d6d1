"""Frozen weights in the layout that the CPU's bfloat16 units read, while responses are sampled.

oneDNN multiplies in tiles. It lays a plain matrix out in tiles again at every product, which is a third of what the
products of a decode step take. Here the matrices that read one input are laid out once for a whole rollout, together
and with the A of their adapters below them: one product says what was several, with the same bits. Afterwards they are
laid out back, since backward needs them plain. Measured in
docs/decisions/0024-weights-in-tiles-while-responses-are-sampled.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hydra_rlhf.model import device

TILE = (64, 32)
"""Rows and columns of a tile."""
MIN_STEPS = 32
"""Decode steps from which on it pays: laying out and back takes as long as some twenty of them save."""


def can_pack(linear: nn.Module, device_type: str) -> bool:
    """Whether products with the weight of this linear are faster on such a device once it is laid out in tiles."""
    if type(linear) is not nn.Linear or linear.weight.dtype != torch.bfloat16 or device_type != "cpu":
        return False
    there = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and torch.backends.mkldnn.is_available()
    return there and device.has_bfloat16_units(torch.device("cpu"))


def filler_bytes(num_rows: int, num_columns: int) -> int:
    """What a matrix in tiles takes more than a plain one, because its sides are multiples of a tile's."""
    rows, columns = (-(-size // tile) * tile for size, tile in zip((num_rows, num_columns), TILE, strict=True))
    return 2 * (rows * columns - num_rows * num_columns)


@dataclass(slots=True, kw_only=True)
class Tiles:
    """W [o, i] of some linears, and below them A [r, i] of their adapters, as one matrix in tiles.

    While it exists the linears' own weights are empty: what would read them fails.
    """

    matrix: Tensor | None
    """Opaque, [sum o + sum r, i]; None once the linears have their weights again."""
    bias: Float[Tensor, " n"] | None
    """Of all of it, if any linear has one; zero for the rest."""
    linears: tuple[nn.Linear, ...]

    @classmethod
    def of(cls, linears: Sequence[nn.Linear], As: Sequence[Float[Tensor, "_ i"]]) -> "Tiles":
        """Lay out these linears and the A, in the linears' dtype. If memory runs out the linears are as they were."""
        weights = [linear.weight for linear in linears]
        joined = torch.cat([weight.detach() for weight in weights] + [A.to(weights[0].dtype) for A in As])
        _share_rows(weights, joined)  # one copy of them at a time
        matrix = torch.ops.mkldnn._reorder_linear_weight(joined)
        bias = None
        if any(linear.bias is not None for linear in linears):
            bias = joined.new_zeros(len(joined))
            for own, linear in zip(_parts(bias, weights), linears, strict=True):
                if linear.bias is not None:
                    own.copy_(linear.bias.detach())
        for weight in weights:
            weight.data = weight.data.new_empty(0)
        return cls(matrix=matrix, bias=bias, linears=tuple(linears))

    def product(self, x: Float[Tensor, "n i"]) -> Float[Tensor, "n m"]:
        """What all W, biases added, and all A say of x, side by side."""
        return torch.ops.mkldnn._linear_pointwise(x, self.matrix, self.bias, "none", [], "")

    def lay_back(self) -> None:
        """Give the linears their weights again."""
        assert self.matrix is not None
        plain, start = self.matrix.to_dense(), 0
        self.matrix = None
        for linear in self.linears:
            linear.weight.data = plain[start : start + linear.out_features].clone()
            start += linear.out_features


def _share_rows(weights: Sequence[Tensor], joined: Float[Tensor, "n i"]) -> None:
    """Make each weight a view of its rows."""
    for weight, part in zip(weights, _parts(joined, weights), strict=True):
        weight.data = part


def _parts(joined: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """The rows of each weight in what was made of all of them."""
    sizes = [len(weight) for weight in weights]
    return joined[: sum(sizes)].split(sizes)
