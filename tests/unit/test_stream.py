"""A response token by token is the response of a rollout, whoever else advances on the same weights meanwhile."""

from itertools import zip_longest
from typing import Any

import pytest
import torch
from contract.tiny import LORA, randomise_adapters, tiny_hydra, tiny_trunk
from torch import Tensor

from hydra_rlhf.config import SamplingConfig
from hydra_rlhf.errors import NonFiniteError
from hydra_rlhf.model import stream
from hydra_rlhf.model.sample import sample_tokens
from hydra_rlhf.model.sampling import SampledTokens
from hydra_rlhf.model.stop_strings import StopStrings
from hydra_rlhf.model.trunk import Trunk

PROMPT = [1, 40, 77, 5, 120, 9, 33]
STOPS = tuple(range(2, 40))
"""About an eighth of the vocabulary, so that responses end."""
LENGTH = 12
CONFIGS = {
    "plain": SamplingConfig(),
    "greedy": SamplingConfig(top_k=1),
    "temperature": SamplingConfig(temperature=0.5),
    "top_p": SamplingConfig(top_p=0.7, temperature=1.5),
    "min_response_tokens": SamplingConfig(min_response_tokens=8),
}


def draws(seed: int) -> Tensor:
    return torch.rand(LENGTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sampled(
    trunk: Trunk, adapter: str | None, uniforms: Tensor, config: SamplingConfig, **others: Any
) -> SampledTokens:
    prompt = torch.tensor([PROMPT])
    mask = torch.ones_like(prompt).bool()
    fields = {"stop_ids": STOPS, "pad_id": 0} | others
    return sample_tokens(trunk, adapter, prompt, mask, uniforms[None], config, **fields)


def adapted_trunk() -> Trunk:
    """A trunk with an actor's LoRA set that matters."""
    hydra = tiny_hydra("hydra-ppo", lora=LORA)
    randomise_adapters(hydra)
    return hydra.trunk("hydra")


@pytest.mark.parametrize("case", list(CONFIGS))
def test_tokens_and_logprobs_are_those_of_a_rollout(case):
    trunk, config = adapted_trunk(), CONFIGS[case]
    lengths, stopped = set(), 0
    for seed in range(4):
        expected = sampled(trunk, "actor", draws(seed), config)
        tokens = list(stream.stream_tokens(trunk, "actor", PROMPT, draws(seed), config, stop_ids=STOPS))
        assert [token.id for token in tokens] == expected.tokens[0].tolist()
        assert [token.logprob for token in tokens] == pytest.approx(expected.logprobs[0].tolist(), abs=1e-5)
        assert [token.is_stop for token in tokens] == [False] * (len(tokens) - 1) + [bool(expected.ended[0])]
        lengths.add(len(tokens))
        stopped += tokens[-1].is_stop
    assert case == "greedy" or (stopped and len(lengths) > 1)  # there are responses that end before they must
    assert case != "min_response_tokens" or min(lengths) >= 8


@pytest.mark.parametrize("least", [1, 6])
def test_a_stop_string_ends_it_as_in_a_rollout(least):
    """Ids as letters: a string that spans two tokens of a response ends it, but not before it may end."""
    trunk, uniforms = adapted_trunk(), draws(5)
    config = SamplingConfig(min_response_tokens=least)
    free = [token.id for token in stream.stream_tokens(trunk, "actor", PROMPT, uniforms, config, stop_ids=(0,))]
    strings = StopStrings(("".join(map(chr, free[2:4])),), lambda ids: "".join(map(chr, ids)))
    expected = sampled(trunk, "actor", uniforms, config, stop_ids=(0,), stop_strings=strings)
    tokens = list(stream.stream_tokens(trunk, "actor", PROMPT, uniforms, config, stop_ids=(0,), stop_strings=strings))
    assert [token.id for token in tokens] == expected.tokens[0].tolist() == free[: max(4, least)]
    assert [token.is_stop for token in tokens] == [False] * (len(tokens) - 1) + [True]


def test_logits_that_are_not_finite_are_told():
    trunk = tiny_trunk("llama")
    with torch.no_grad():
        trunk.lm_head.weight[7] = torch.nan
    with pytest.raises(NonFiniteError, match="its weights are damaged"):
        next(stream.stream_tokens(trunk, None, PROMPT, draws(0), SamplingConfig(), stop_ids=STOPS))


@pytest.mark.parametrize("family", ["opt", "gpt2", "qwen3", "gemma2", "mistral"])
def test_every_family_goes_on_from_its_own_cache(family):
    """Sliding windows of six tokens and learned positions included."""
    trunk = tiny_trunk(family)
    expected = sampled(trunk, None, draws(1), CONFIGS["min_response_tokens"])
    tokens = stream.stream_tokens(trunk, None, PROMPT, draws(1), CONFIGS["min_response_tokens"], stop_ids=STOPS)
    assert [token.id for token in tokens] == expected.tokens[0].tolist()


def test_two_that_advance_in_turns_are_those_that_advance_alone():
    trunk, config = adapted_trunk(), CONFIGS["min_response_tokens"]
    uniforms = draws(3)
    alone = [sampled(trunk, adapter, uniforms, config).tokens[0].tolist() for adapter in ("actor", None)]
    both = [
        stream.stream_tokens(trunk, adapter, PROMPT, uniforms, config, stop_ids=STOPS) for adapter in ("actor", None)
    ]
    rounds = list(zip_longest(*both))
    assert [[token.id for token in tokens if token] for tokens in zip(*rounds, strict=True)] == alone
    assert alone[0] != alone[1]


def test_nothing_is_computed_before_it_is_asked_for_and_no_graph_is_kept():
    trunk = adapted_trunk()
    passes = []
    trunk.decoder.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    tokens = stream.stream_tokens(
        trunk, "actor", PROMPT, draws(0), SamplingConfig(min_response_tokens=8), stop_ids=STOPS
    )
    assert passes == []
    next(tokens)
    assert passes == [False]
    assert torch.is_grad_enabled()  # between two tokens the reader's own work keeps its graph
    next(tokens)
    assert passes == [False, False]
