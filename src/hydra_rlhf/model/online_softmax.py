"""Log-prob and entropy of a softmax whose logits are seen one tile of columns at a time: the mathematics of one tile.

A tile holds the products of some states with some rows of the head. It is turned into logits, folded into the running
statistics of its rows, and in backward into the gradient of the products. Everything is done in place where it can be:
besides the tile itself, at most one more tensor of its size lives.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogitShaping:
    """What stands between the head's product and the softmax: a scale, then a soft cap, then the temperature."""

    scale: float
    softcap: float | None
    temperature: float

    def apply_(self, tile: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Products -> logits, in place."""
        if self.scale != 1.0:
            tile.mul_(self.scale)
        if self.softcap is not None:
            tile.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1.0:
            tile.div_(self.temperature)
        return tile

    def pull_back_(self, gradient: Float[Tensor, "*n"], logits: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Gradient of the `logits` -> gradient of the products they came from, in place."""
        if self.softcap is not None:
            # times 1 - tanh, then times 1 + tanh, with tanh read back from the logits: no further tile is needed.
            tanh_per_logit = self.temperature / self.softcap
            gradient.addcmul_(gradient, logits, value=-tanh_per_logit)
            gradient.addcmul_(gradient, logits, value=tanh_per_logit)
        if self.scale != self.temperature:
            gradient.mul_(self.scale / self.temperature)
        return gradient


@dataclass(frozen=True, slots=True)
class RunningSoftmax:
    """Statistics of each row's logits x over the columns folded so far, in float32 at least.

    The peak is kept apart from the sum and never added to it: with logits around 1e7 (a temperature of 1e-3) their
    log-sum-exp would be known to the nearest whole number only, while x - peak is exact.
    """

    peak: Float[Tensor, " n"]
    """The largest logit."""
    total: Float[Tensor, " n"]
    """Sum of exp(x - peak)."""
    weighted: Float[Tensor, " n"]
    """Sum of (x - peak) exp(x - peak)."""
    target_logit: Float[Tensor, " n"]
    """The target's logit; 0 until its column came by."""

    @classmethod
    def empty(cls, num_rows: int, *, dtype: torch.dtype, device: torch.device) -> "RunningSoftmax":
        """Nothing folded yet. The peak starts finite: minus infinity would make 0 x infinity of the first rescaling."""
        peak = torch.full((num_rows,), torch.finfo(dtype).min, dtype=dtype, device=device)
        return cls(peak, torch.zeros_like(peak), torch.zeros_like(peak), torch.zeros_like(peak))

    def rows(self, tokens: slice) -> "RunningSoftmax":
        """A view of some rows: folding into it folds into this one."""
        return RunningSoftmax(self.peak[tokens], self.total[tokens], self.weighted[tokens], self.target_logit[tokens])

    def fold_(
        self, tile: Float[Tensor, "n c"], targets: Int[Tensor, " n"], shaping: LogitShaping
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n c"]]:
        """Fold in the columns of one tile of products, which is overwritten.

        `targets` count from the tile's first column; those outside of it are elsewhere in the vocabulary. Returns by
        what each row's earlier sums have shrunk, and exp(x - peak) of the tile.
        """
        shaping.apply_(tile)
        inside, column = locate(targets, tile.shape[1])
        self.target_logit.copy_(torch.where(inside, tile.gather(1, column).squeeze(1), self.target_logit))
        peak = torch.maximum(self.peak, tile.amax(dim=1))
        shift = self.peak - peak
        shrink = shift.exp()
        tile.sub_(peak[:, None])
        exponentials = tile.exp()
        self.weighted.addcmul_(shift, self.total).mul_(shrink)
        self.total.mul_(shrink).add_(exponentials.sum(dim=1))
        self.weighted.add_(tile.mul_(exponentials).sum(dim=1))
        self.peak.copy_(peak)
        return shrink, exponentials

    def logprobs(self) -> Float[Tensor, " n"]:
        """Log-prob of each target, once every column is folded in."""
        return self.target_logit - self.peak - self.total.log()

    def entropy(self) -> Float[Tensor, " n"]:
        """Entropy of each row in nats, once every column is folded in."""
        return self.total.log() - self.weighted / self.total

    def gradient(
        self,
        tile: Float[Tensor, "n c"],
        targets: Int[Tensor, " n"],
        shaping: LogitShaping,
        grad_logprobs: Float[Tensor, " n"],
        grad_entropy: Float[Tensor, " n"] | None,
    ) -> Float[Tensor, "n c"]:
        """Gradient of one tile of products, which is overwritten; `self` has every column folded in.

        With p = exp(x - peak) / total: d logprob / dx = [x is the target's] - p, d entropy / dx = -p (log p + entropy).
        """
        logits = shaping.apply_(tile)
        gradient = (logits - self.peak[:, None]).exp_()
        shaping.pull_back_(gradient, logits)
        if grad_entropy is None:
            gradient.mul_((-grad_logprobs / self.total)[:, None])
        else:
            # -p (g_logprob + g_entropy (log p + entropy)) is exp(x - peak) times a line in x - peak.
            slope = -grad_entropy / self.total
            offset = slope * (self.entropy() - self.total.log()) - grad_logprobs / self.total
            gradient.mul_(logits.sub_(self.peak[:, None]).mul_(slope[:, None]).add_(offset[:, None]))
        inside, column = locate(targets, tile.shape[1])
        at_target = shaping.pull_back_(torch.where(inside, grad_logprobs, 0.0), self.target_logit)
        return gradient.scatter_(1, column, gradient.gather(1, column) + at_target[:, None])


def locate(targets: Int[Tensor, " n"], num_columns: int) -> tuple[Tensor, Int[Tensor, "n 1"]]:
    """Which targets lie in a tile, and a column to read for each: their own, or any where they lie elsewhere."""
    inside = (targets >= 0) & (targets < num_columns)
    return inside, targets.clamp(0, num_columns - 1)[:, None]
