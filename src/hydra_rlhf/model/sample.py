"""Prompts -> responses, token by token, on the training weights (adapters are never merged for sampling).

Each draw uses one uniform number that belongs to (sequence, position), so a response does not depend on what shares
its batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hydra_rlhf.config import SamplingConfig
from hydra_rlhf.errors import NonFiniteError
from hydra_rlhf.model.cache import PreallocatedCache
from hydra_rlhf.model.heads import LMHead
from hydra_rlhf.model.logprobs import LOGIT_TILE_BYTES
from hydra_rlhf.model.trunk import Trunk

COMPACT_BELOW = 0.75
"""Finished rows leave the batch when fewer than this share of its rows still run."""
DRAW_BYTES = 16
"""Bytes per logit while tokens are drawn: logits and exponentials in float32, their running sum in float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """Responses as ids, padded on the right to the longest."""

    tokens: Int[Tensor, "b r"]
    """`pad_id` where masked."""
    mask: Bool[Tensor, "b r"]
    """True at sampled tokens, the stop token included."""
    logprobs: Float[Tensor, "b r"]
    """Log-prob of each token at the sampling temperature, before top-k and top-p; 0 where masked."""
    ended: Bool[Tensor, " b"]
    """True where the response ends in a stop token."""


@torch.no_grad()
def sample_tokens(
    trunk: Trunk,
    adapter: str | None,
    prompts: Int[Tensor, "b p"],
    prompt_mask: Bool[Tensor, "b p"],
    uniforms: Float[Tensor, "b n"],
    config: SamplingConfig,
    *,
    stop_ids: tuple[int, ...],
    pad_id: int,
    after_token: Callable[[], None] = lambda: None,
    tile_bytes: int = LOGIT_TILE_BYTES,
) -> SampledTokens:
    """Sample one response per row of left-padded prompts, at most n = `uniforms.shape[1]` tokens each.

    `after_token` is called between decode steps and may raise to stop. Logits live in tiles of `tile_bytes`.
    """
    num_rows, limit = uniforms.shape
    stops = torch.tensor(stop_ids, device=prompts.device)
    tokens = torch.full((num_rows, limit), pad_id, device=prompts.device)
    mask = torch.zeros((num_rows, limit), dtype=torch.bool, device=prompts.device)
    logprobs = torch.zeros((num_rows, limit), dtype=wide(trunk.dtype), device=prompts.device)
    ended = torch.zeros(num_rows, dtype=torch.bool, device=prompts.device)
    rows = torch.arange(num_rows, device=prompts.device)
    cache, attention = PreallocatedCache(prompts.shape[1] + limit), prompt_mask
    # Cloned, so that of the prompts' states only the last ones stay: the others are read by nobody.
    states = trunk.hidden_states(prompts, attention, adapter=adapter, cache=cache)[:, -1].clone()
    head = trunk.lm_head
    for t in range(limit):
        forbidden = stops if t + 1 < config.min_response_tokens else stops[:0]
        drawn, drawn_logprobs = draw_in_tiles(
            head, states, uniforms[rows, t], config, forbidden=forbidden, tile_bytes=tile_bytes
        )
        running = ~ended[rows]
        mask[rows, t] = running
        tokens[rows, t] = torch.where(running, drawn, pad_id)
        logprobs[rows, t] = torch.where(running, drawn_logprobs, 0.0)
        ended[rows] |= torch.isin(drawn, stops)
        running = ~ended[rows]
        num_running = int(running.sum())
        after_token()
        if num_running == 0 or t + 1 == limit:
            break
        if num_running < COMPACT_BELOW * len(rows):
            cache.batch_select_indices(running.nonzero().squeeze(1))
            rows, attention, drawn = rows[running], attention[running], drawn[running]
        # Rows that have ended but still share the batch go on decoding; what they draw is not kept.
        mask_column = torch.ones_like(attention[:, :1])
        attention = torch.cat([attention, mask_column], dim=1)
        states = trunk.hidden_states(drawn[:, None], attention, adapter=adapter, cache=cache)[:, -1]
    width = int(mask.sum(dim=1).max())
    return SampledTokens(tokens=tokens[:, :width], mask=mask[:, :width], logprobs=logprobs[:, :width], ended=ended)


def wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32: what log-probs are kept in."""
    return torch.promote_types(dtype, torch.float32)


def draw_in_tiles(
    head: LMHead,
    states: Float[Tensor, "b h"],
    uniforms: Float[Tensor, " b"],
    config: SamplingConfig,
    *,
    forbidden: Int[Tensor, " k"],
    tile_bytes: int,
) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
    """One token per row, none of the `forbidden` ids, and its log-prob as training would have it: of all tokens.

    Logits live of so many rows at a time that a tile holds their draw.
    """
    size = max(1, tile_bytes // (DRAW_BYTES * len(head.weight)))
    tokens: list[Tensor] = []
    logprobs: list[Tensor] = []
    for start in range(0, len(states), size):
        logits = head.logits(states[start : start + size])
        if config.temperature != 1.0:
            logits /= config.temperature
        log_normaliser = logits.logsumexp(dim=-1)
        logits[:, forbidden] = -torch.inf
        tokens.append(draw(logits, uniforms[start : start + size], config))
        logprobs.append(logits.gather(1, tokens[-1][:, None]).squeeze(1) - log_normaliser)
    return torch.cat(tokens), torch.cat(logprobs)


def draw(logits: Float[Tensor, "b v"], uniforms: Float[Tensor, " b"], config: SamplingConfig) -> Int[Tensor, " b"]:
    """One token per row by inverting the cumulative distribution at the row's uniform number.

    `logits` are at the sampling temperature already. Exponentials are float32; only their sum needs more.
    """
    kept = restrict(logits, config)
    weights = (kept - kept.amax(dim=-1, keepdim=True)).exp_()
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    if not bool(cumulative[:, -1].isfinite().all()):
        raise NonFiniteError("the model's logits are not finite, so nothing can be sampled; its weights are damaged")
    at = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


def restrict(logits: Float[Tensor, "b v"], config: SamplingConfig) -> Float[Tensor, "b v"]:
    """Set logits outside top-k and top-p to -inf. The likeliest token always stays."""
    if config.top_k:
        kth = logits.topk(min(config.top_k, logits.shape[1]), dim=-1).values[:, -1:]
        logits = torch.where(logits < kth, -torch.inf, logits)
    if config.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        outside = probabilities.cumsum(dim=-1) - probabilities >= config.top_p
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    return logits
