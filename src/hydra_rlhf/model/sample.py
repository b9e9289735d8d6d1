"""Prompts -> responses, token by token, on the training weights (adapters are never merged for sampling)."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from hydra_rlhf.config import SamplingConfig
from hydra_rlhf.model.adapters import in_tiles
from hydra_rlhf.model.generate import generate
from hydra_rlhf.model.generate_batch import generate_batch
from hydra_rlhf.model.graphs import decode_in_graphs
from hydra_rlhf.model.packing import MIN_STEPS
from hydra_rlhf.model.sampling import SampledTokens, Sampling
from hydra_rlhf.model.slots import decode
from hydra_rlhf.model.trunk import Trunk

Engine = Callable[[Sampling, int], None]
"""Finishes all rows of a sampling that are not finished, at most so many at a time; may be called again."""
ENGINES: Mapping[str, Engine] = MappingProxyType(
    {"slots": decode, "graphs": decode_in_graphs, "generate": generate, "generate_batch": generate_batch}
)
"""Every engine, by the name `ppo.sampling.engine` uses. The same uniform numbers give the same tokens in each."""


def sample_tokens(
    trunk: Trunk,
    adapter: str | None,
    prompts: Int[Tensor, "b p"],
    prompt_mask: Bool[Tensor, "b p"],
    uniforms: Float[Tensor, "b n"],
    config: SamplingConfig,
    *,
    num_rows: int | None = None,
    **others: Any,
) -> SampledTokens:
    """One response per row of left-padded prompts, at most n = `uniforms.shape[1]` tokens each.

    At most `num_rows` are decoded at a time; `others` are further fields of `Sampling`.
    """
    sampling = Sampling(
        trunk=trunk,
        adapter=adapter,
        prompts=prompts,
        prompt_mask=prompt_mask,
        uniforms=uniforms,
        config=config,
        **others,
    )
    finish(sampling, num_rows or len(prompts))
    return sampling.result()


def finish(sampling: Sampling, num_rows: int) -> None:
    """Finish all rows that are not finished with the engine of the settings, at most `num_rows` at a time."""
    trunk = sampling.trunk
    linears = trunk.lora_linears.values() if sampling.limit >= MIN_STEPS else ()
    with trunk.switch.fixed(), in_tiles(linears, trunk.switch.stack_with(sampling.adapter)):
        ENGINES[sampling.config.engine](sampling, num_rows)
