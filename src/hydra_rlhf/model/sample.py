"""Prompts -> responses, token by token, on the training weights (adapters are never merged for sampling).

Each draw uses one uniform number that belongs to (sequence, position), so a response does not depend on what shares
its batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache

from hydra_rlhf.config import SamplingConfig
from hydra_rlhf.errors import NonFiniteError
from hydra_rlhf.model.trunk import Trunk

COMPACT_BELOW = 0.75
"""Finished rows leave the batch when fewer than this share of its rows still run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """Responses as ids, padded on the right to the longest."""

    tokens: Int[Tensor, "b r"]
    """`pad_id` where masked."""
    mask: Bool[Tensor, "b r"]
    """True at sampled tokens, the stop token included."""
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
) -> SampledTokens:
    """Sample one response per row of left-padded prompts, at most n = `uniforms.shape[1]` tokens each.

    `after_token` is called between decode steps and may raise to stop.
    """
    num_rows, limit = uniforms.shape
    stops = torch.tensor(stop_ids, device=prompts.device)
    tokens = torch.full((num_rows, limit), pad_id, device=prompts.device)
    mask = torch.zeros((num_rows, limit), dtype=torch.bool, device=prompts.device)
    ended = torch.zeros(num_rows, dtype=torch.bool, device=prompts.device)
    rows = torch.arange(num_rows, device=prompts.device)
    cache, attention = DynamicCache(), prompt_mask
    hidden = trunk.hidden_states(prompts, attention, adapter=adapter, cache=cache)
    head = trunk.lm_head
    for t in range(limit):
        logits = head.logits(hidden[:, -1])
        if t + 1 < config.min_response_tokens:
            logits[:, stops] = -torch.inf
        drawn = draw(logits, uniforms[rows, t], config)
        running = ~ended[rows]
        mask[rows, t] = running
        tokens[rows, t] = torch.where(running, drawn, pad_id)
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
        hidden = trunk.hidden_states(drawn[:, None], attention, adapter=adapter, cache=cache)
    width = int(mask.sum(dim=1).max())
    return SampledTokens(tokens=tokens[:, :width], mask=mask[:, :width], ended=ended)


def draw(logits: Float[Tensor, "b v"], uniforms: Float[Tensor, " b"], config: SamplingConfig) -> Int[Tensor, " b"]:
    """One token per row by inverting the cumulative distribution at the row's uniform number."""
    logits = restrict(logits / config.temperature, config)
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
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
