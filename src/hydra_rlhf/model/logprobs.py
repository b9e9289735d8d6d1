"""Log-probs and entropy of response tokens without ever holding [b, s, v] logits.

This is the one place where the next-token shift happens: response token t is predicted by the hidden state one column
before it.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hydra_rlhf.model.heads import LMHead
from hydra_rlhf.records import TokenBatch

LOGIT_TILE_BYTES = 32 * 2**20
"""Float32 logits live at once per tile; above it, tiles are recomputed in backward instead of kept."""


def predicting_states(hidden: Float[Tensor, "b s h"], batch: TokenBatch) -> Float[Tensor, "b r h"]:
    """The hidden state that predicts each response token, i.e. the state before that token."""
    first = batch.num_prompt_columns - 1
    return hidden[:, first:-1]


def last_states(hidden: Float[Tensor, "b s h"], batch: TokenBatch) -> Float[Tensor, "b h"]:
    """The hidden state at the last counted response token, where rewards are read."""
    columns = batch.num_prompt_columns + batch.response_mask.sum(dim=1) - 1
    return hidden[torch.arange(len(columns), device=hidden.device), columns]


def response_logprobs(
    head: LMHead,
    hidden: Float[Tensor, "b s h"],
    batch: TokenBatch,
    mask: Bool[Tensor, "b r"],
    *,
    temperature: float,
    entropy_gradient: bool = False,
    tile_bytes: int = LOGIT_TILE_BYTES,
) -> tuple[Float[Tensor, "b r"], Float[Tensor, "b r"]]:
    """Log-prob and entropy (nats) of the response tokens in `mask` at `temperature`; 0 elsewhere.

    Only these positions meet the head, `tile_bytes` of float32 logits at a time. Statistics are float32.
    """
    states = predicting_states(hidden, batch)[mask]
    targets = batch.tokens[:, batch.num_prompt_columns :][mask]
    logprobs, entropy = token_logprobs(
        head, states, targets, temperature=temperature, entropy_gradient=entropy_gradient, tile_bytes=tile_bytes
    )
    return scatter(logprobs, mask), scatter(entropy, mask)


def token_logprobs(
    head: LMHead,
    states: Float[Tensor, "n h"],
    targets: Int[Tensor, " n"],
    *,
    temperature: float,
    entropy_gradient: bool = False,
    tile_bytes: int = LOGIT_TILE_BYTES,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Log-prob of each target and entropy of each distribution, tile by tile over tokens.

    The entropy is a metric and keeps no graph, unless `entropy_gradient` asks for it.
    """
    rows = max(1, tile_bytes // (4 * head.weight.shape[0]))
    if len(targets) <= rows:
        return _tile(head, states, targets, temperature, entropy_gradient)
    tiles = [
        checkpoint(
            _tile, head, states[i : i + rows], targets[i : i + rows], temperature, entropy_gradient, use_reentrant=False
        )
        if torch.is_grad_enabled()
        else _tile(head, states[i : i + rows], targets[i : i + rows], temperature, entropy_gradient)
        for i in range(0, len(targets), rows)
    ]
    logprobs, entropy = zip(*tiles, strict=True)  # pyright: ignore[reportArgumentType]
    return torch.cat(logprobs), torch.cat(entropy)


def _tile(
    head: LMHead,
    states: Float[Tensor, "n h"],
    targets: Int[Tensor, " n"],
    temperature: float,
    entropy_gradient: bool,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    logits = head.logits(states)
    if temperature != 1.0:
        logits = logits / temperature
    log_normaliser = logits.logsumexp(dim=-1)
    logprobs = logits.gather(1, targets[:, None]).squeeze(1) - log_normaliser
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        probabilities = (logits - log_normaliser[:, None]).exp()
        entropy = log_normaliser - (probabilities * logits).sum(dim=-1)
    return logprobs, entropy


def scatter(values: Float[Tensor, " n"], mask: Bool[Tensor, "b r"]) -> Float[Tensor, "b r"]:
    """Put one value per counted token back into its [b, r] place; 0 elsewhere. Differentiable."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
