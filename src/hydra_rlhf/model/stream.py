"""One response, token by token, for somebody who watches; rollouts draw whole batches (`sample.py`).

It decodes as a rollout does, so the same uniform numbers give the same tokens. Between two tokens nothing is held but
this response's own cache: several responses, with and without a LoRA set, can advance in turns on the same weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hydra_rlhf.config import SamplingConfig
from hydra_rlhf.errors import NonFiniteError
from hydra_rlhf.model.cache import PreallocatedCache
from hydra_rlhf.model.draw import Drawn, draw_in_tiles
from hydra_rlhf.model.logprobs import LOGIT_TILE_BYTES
from hydra_rlhf.model.stop_strings import StopStrings
from hydra_rlhf.model.trunk import Trunk


@dataclass(frozen=True, slots=True)
class DrawnToken:
    """One token of a response."""

    id: int
    logprob: float
    """At the sampling temperature, before top-k, top-p and min-p."""
    is_stop: bool
    """Whether the response ends with it: a stop token, or the end of a stop string."""


def stream_tokens(
    trunk: Trunk,
    adapter: str | None,
    prompt_ids: Sequence[int],
    uniforms: Float[Tensor, " n"],
    config: SamplingConfig,
    *,
    stop_ids: tuple[int, ...],
    stop_strings: StopStrings | None = None,
    tile_bytes: int = LOGIT_TILE_BYTES,
) -> Iterator[DrawnToken]:
    """At most n = `len(uniforms)` tokens that answer a prompt, up to and with the first one that ends it.

    Each is computed when it is asked for, the first one with the pass over the prompt.
    """
    stops = torch.tensor(stop_ids, device=trunk.device)
    uniforms = uniforms.to(trunk.device)
    tokens = torch.tensor([list(prompt_ids)], device=trunk.device)
    attention = torch.ones_like(tokens, dtype=torch.bool)
    cache = PreallocatedCache(tokens.shape[1] + len(uniforms))
    ids: list[int] = []
    for t in range(len(uniforms)):
        forbidden = stops if t + 1 < config.min_response_tokens else stops[:0]
        drawn = _draw_next(trunk, adapter, tokens, attention, cache, uniforms[t : t + 1], config, forbidden, tile_bytes)
        if not bool(drawn.finite):
            raise NonFiniteError(
                "the model's logits are not finite, so nothing can be sampled; its weights are damaged"
            )
        ids.append(int(drawn.tokens))
        found = stop_strings and stop_strings.first_end(ids, t, least=config.min_response_tokens)
        is_stop = ids[-1] in stop_ids or bool(found)
        yield DrawnToken(ids[-1], float(drawn.logprobs), is_stop)
        if is_stop:
            return
        tokens = drawn.tokens[:, None]
        attention = torch.cat([attention, torch.ones_like(attention[:, :1])], dim=1)


@torch.no_grad()  # not on the generator: what stands between two tokens is its reader's
def _draw_next(
    trunk: Trunk,
    adapter: str | None,
    tokens: Int[Tensor, "1 s"],
    attention: Bool[Tensor, "1 k"],
    cache: PreallocatedCache,
    uniform: Float[Tensor, " 1"],
    config: SamplingConfig,
    forbidden: Int[Tensor, " f"],
    tile_bytes: int,
) -> Drawn:
    states = trunk.hidden_states(tokens, attention, adapter=adapter, cache=cache)[:, -1]
    return draw_in_tiles(trunk.lm_head, states, uniform, config, forbidden=forbidden, tile_bytes=tile_bytes)
