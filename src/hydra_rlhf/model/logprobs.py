"""Log-probs and entropy of response tokens without ever holding [b, s, v] logits.

This is the one place where the next-token shift happens: response token t is predicted by the hidden state one column
before it.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hydra_rlhf.model.heads import LMHead
from hydra_rlhf.model.swept_logprobs import one_sweep_will_do, swept_logprobs
from hydra_rlhf.model.tiled_logprobs import tiled_logprobs
from hydra_rlhf.records import TokenBatch

LOGIT_TILE_BYTES = 32 * 2**20
"""The largest tensor of logits, in float32 bytes; more of them are made in tiles, and again in backward."""
CPU_TILE_BYTES = 4 * 2**20
"""On the CPU tiles stay in its cache: 256 tokens and a head of 49,152 x 576 in bfloat16, log-probs and gradient, took
251 ms in tiles of 32 MiB, 206 of 4 and 225 of 1; without gradient 170, 126 and 134 (two cores)."""


def sweep_bytes(tile_bytes: int, device_type: str) -> int:
    """Bytes of the largest block of logits on a kind of device, at most `tile_bytes`."""
    return min(tile_bytes, CPU_TILE_BYTES) if device_type == "cpu" else tile_bytes


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

    Only these positions meet the head, in tiles of `tile_bytes` of float32 logits. Statistics are float32.
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
    """Log-prob of each target and entropy of each distribution.

    The entropy is a metric and keeps no graph, unless `entropy_gradient` asks for it. Where the logits are few they are
    simply kept; else, and in half precision always, they live in tiles. So the numbers of a half-precision head do not
    depend on how many tokens there are: tiles are not rounded to its dtype, plain logits would be.
    """
    tile_bytes = sweep_bytes(tile_bytes, states.device.type)
    num_bytes = 4 * len(targets) * len(head.weight)
    fits = num_bytes <= tile_bytes and head.weight.dtype in (torch.float32, torch.float64)
    if fits:
        return direct_logprobs(head, states, targets, temperature=temperature, entropy_gradient=entropy_gradient)
    if one_sweep_will_do(head, states, entropy_gradient=entropy_gradient):
        return swept_logprobs(head, states, targets, temperature=temperature, tile_bytes=tile_bytes)
    return tiled_logprobs(
        head, states, targets, temperature=temperature, entropy_gradient=entropy_gradient, tile_bytes=tile_bytes
    )


def direct_logprobs(
    head: LMHead,
    states: Float[Tensor, "n h"],
    targets: Int[Tensor, " n"],
    *,
    temperature: float,
    entropy_gradient: bool,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """The same with all logits at once and kept for backward: what `tiled_logprobs` is held against."""
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
