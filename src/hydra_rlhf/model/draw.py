"""Hidden states -> tokens: one uniform number inverts each row's cumulative distribution."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hydra_rlhf.config import SamplingConfig
from hydra_rlhf.model.fused import frozen_product
from hydra_rlhf.model.heads import LMHead, Product

DRAW_BYTES = 8
"""Bytes per logit while tokens are drawn: logits and their exponentials, in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One token per row."""

    tokens: Int[Tensor, " b"]
    logprobs: Float[Tensor, " b"]
    """Log-probs as training has them: among all tokens, whatever was forbidden or cut off."""
    finite: Bool[Tensor, ""]
    """Whether all logits were; nobody waits for the device to say so at every step."""


class GivenLogits:
    """Stands in for a head where somebody else has computed the logits: its states are they."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def logits(self, logits: Float[Tensor, "b v"], product: Product) -> Float[Tensor, "b v"]:
        """A copy, which may be written to."""
        del product
        return logits.clone()


def draw_in_tiles(
    head: "LMHead | GivenLogits",
    states: Float[Tensor, "b h"],
    uniforms: Float[Tensor, " b"],
    config: SamplingConfig,
    *,
    forbidden: Int[Tensor, " k"],
    tile_bytes: int,
    forbids: Bool[Tensor, " b"] | None = None,
) -> Drawn:
    """One token per row, none of the `forbidden` ids in rows where `forbids` says so (None = in all).

    Logits live of so many rows at a time that a tile holds their draw.
    """
    size = max(1, tile_bytes // (DRAW_BYTES * head.vocab_size))
    tokens: list[Tensor] = []
    logprobs: list[Tensor] = []
    finite = torch.ones((), dtype=torch.bool, device=states.device)
    for start in range(0, len(states), size):
        tile = slice(start, start + size)
        logits = head.logits(states[tile], frozen_product)
        if config.temperature != 1.0:
            logits /= config.temperature
        shares = Shares(logits)
        log_normaliser = shares.log_total()
        finite &= log_normaliser.isfinite().all()
        if len(forbidden):
            held = -torch.inf if forbids is None else torch.where(forbids[tile, None], -torch.inf, logits[:, forbidden])
            logits[:, forbidden] = held
        if len(forbidden) or restricts(config):
            del shares
            shares = Shares(restrict(logits, config))
        tokens.append(shares.draw(uniforms[tile]))
        logprobs.append(logits.gather(1, tokens[-1][:, None]).squeeze(1) - log_normaliser)
    return Drawn(tokens=torch.cat(tokens), logprobs=torch.cat(logprobs), finite=finite)


class Shares:
    """What each token has of its row's probability, up to a factor, and the sums of blocks of neighbouring tokens.

    A token is found in two steps, its block and then its place there, so that nothing is summed up token by token over
    a whole vocabulary: at 64 rows of 49,152 tokens a running sum takes 21 ms on two cores and the sums of blocks 0.1.
    Sums are float32 inside a block and float64 from there on.
    """

    def __init__(self, logits: Float[Tensor, "b v"]) -> None:
        """`logits` stay as they are."""
        self.peak = logits.amax(dim=-1, keepdim=True)
        self.values = (logits - self.peak).exp_()
        vocab = logits.shape[1]
        self.block = 1 << math.isqrt(vocab).bit_length()
        """About the square root of the vocabulary."""
        num = vocab // self.block
        whole, rest = self.values[:, : num * self.block], self.values[:, num * self.block :]
        sums = [whole.unflatten(1, (num, self.block)).sum(dim=-1), rest.sum(dim=-1, keepdim=True)]
        self.sums = torch.cat(sums, dim=1).double()

    def log_total(self) -> Float[Tensor, " b"]:
        """The logarithm of the sum of the logits' exponentials."""
        return self.peak.squeeze(1) + self.sums.sum(dim=1).log().to(self.peak.dtype)

    def draw(self, uniforms: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
        """One token per row: the inverse of its cumulative distribution at the row's uniform number."""
        block, left = find(self.sums, uniforms.double() * self.sums.sum(dim=1))
        columns = block[:, None] * self.block + torch.arange(self.block, device=block.device)
        last = self.values.shape[1] - 1  # read again where the last block would go on, and meant by its repetitions
        place, _ = find(self.values.gather(1, columns.clamp(max=last)).double(), left)
        return (block * self.block + place).clamp(max=last)


def find(masses: Float[Tensor, "b n"], at: Float[Tensor, " b"]) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
    """In each row the first entry that the running sum passes `at` with, and how far into that entry `at` lies.

    Rounding never leads to an entry without mass.
    """
    cumulative = masses.cumsum(dim=1)
    at = torch.minimum(at.clamp(min=0.0), cumulative[:, -1] * (1.0 - torch.finfo(masses.dtype).eps))[:, None]
    index = torch.searchsorted(cumulative, at, right=True).clamp(max=masses.shape[1] - 1)
    before = cumulative.gather(1, index) - masses.gather(1, index)
    return index.squeeze(1), (at - before).squeeze(1)


def restricts(config: SamplingConfig) -> bool:
    """Whether some tokens are left out of a draw for being unlikely."""
    return bool(config.top_k) or config.top_p < 1.0 or config.min_p > 0.0


def restrict(logits: Float[Tensor, "b v"], config: SamplingConfig) -> Float[Tensor, "b v"]:
    """Set logits outside top-k, top-p and min-p to -inf, in this order. The likeliest token always stays."""
    if config.top_k:
        kth = logits.topk(min(config.top_k, logits.shape[1]), dim=-1).values[:, -1:]
        logits = torch.where(logits < kth, -torch.inf, logits)
    if config.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        outside = probabilities.cumsum(dim=-1) - probabilities >= config.top_p
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    if config.min_p > 0.0:
        least = logits.amax(dim=-1, keepdim=True) + math.log(config.min_p)
        logits = torch.where(logits < least, -torch.inf, logits)
    return logits
