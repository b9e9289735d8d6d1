"""Hidden states -> tokens: one uniform number inverts each row's cumulative distribution."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hydra_rlhf.config import SamplingConfig
from hydra_rlhf.model.heads import LMHead

DRAW_BYTES = 16
"""Bytes per logit while tokens are drawn: logits and exponentials in float32, their running sum in float64."""


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

    def logits(self, logits: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
        """A copy, which may be written to."""
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
        logits = head.logits(states[tile])
        if config.temperature != 1.0:
            logits /= config.temperature
        log_normaliser = logits.logsumexp(dim=-1)
        finite &= log_normaliser.isfinite().all()
        if len(forbidden):
            held = -torch.inf if forbids is None else torch.where(forbids[tile, None], -torch.inf, logits[:, forbidden])
            logits[:, forbidden] = held
        tokens.append(draw(logits, uniforms[tile], config))
        logprobs.append(logits.gather(1, tokens[-1][:, None]).squeeze(1) - log_normaliser)
    return Drawn(tokens=torch.cat(tokens), logprobs=torch.cat(logprobs), finite=finite)


def draw(logits: Float[Tensor, "b v"], uniforms: Float[Tensor, " b"], config: SamplingConfig) -> Int[Tensor, " b"]:
    """One token per row by inverting the cumulative distribution at the row's uniform number.

    `logits` are at the sampling temperature already. Exponentials are float32; only their sum needs more.
    """
    kept = restrict(logits, config)
    weights = (kept - kept.amax(dim=-1, keepdim=True)).exp_()
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    at = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


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
