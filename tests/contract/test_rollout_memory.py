"""What a rollout holds, for every family: one cache of known bytes that changes no bit, groups that change no token."""

import gc
import weakref
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache

from contract.tiny import CONFIGS, FAMILIES, VOCAB, chat, ppo_config, prompts, randomise_adapters, tiny_hydra
from hydra_rlhf.config import SamplingConfig
from hydra_rlhf.model import device, sample, sampling, slots
from hydra_rlhf.model.cache import Columns, PreallocatedCache, cache_bytes
from hydra_rlhf.model.device import has_bfloat16_units as ask_the_machine  # the tests' own answer is put in its place
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.packing import Tiles
from hydra_rlhf.records import Responses
from hydra_rlhf.stages.held_out import sample_and_score
from hydra_rlhf.stages.limits import StageLimits
from hydra_rlhf.stages.rollout import prompt_batch, sample_responses

LIMIT = 10
"""With prompts of up to 6 tokens, longer than the sliding windows of gemma2 and mistral."""
STOPS = tuple(range(2, 60))
"""A fifth of the vocabulary, so that rows end at different times and leave the batch."""


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def respond(hydra: HydraModel, limits: StageLimits, num_prompts: int = 12, **changes: object) -> Responses:
    """Responses of the actor to the tiny prompts."""
    config = SamplingConfig(max_response_tokens=LIMIT, stop_token_ids=STOPS, **changes)  # pyright: ignore
    batch = prompt_batch(prompts(num_prompts), range(num_prompts), 1, 0, torch.device("cpu"))
    return sample_responses(hydra, chat(hydra), "actor", batch, config, stream=(0, "test"), limits=limits)


def actor_model(family: str, dtype: torch.dtype = torch.float32) -> HydraModel:
    """A model whose actor is not its reference."""
    hydra = tiny_hydra("hydra-ppo", family, dtype)
    randomise_adapters(hydra, 0.1)
    return hydra


class GrowingCache(DynamicCache):
    """transformers' own cache, for rows that all start together."""

    def __init__(self, num_columns: int, num_rows: int) -> None:
        super().__init__()
        self.columns = Columns(num_columns, num_rows)

    def joining(self, rows: Tensor, sources: Tensor, stop: int) -> AbstractContextManager[None]:
        assert rows.tolist() == sources.tolist() == list(range(len(rows)))
        assert not self.layers
        return nullcontext()

    def drop_before(self, column: int) -> None:
        for layer in self.layers:
            layer.keys = layer.keys[..., column - self.columns.start :, :]
            layer.values = layer.values[..., column - self.columns.start :, :]
        self.columns.start = column


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_changes_no_bit(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Every state that a token was drawn from, and every token, against transformers' growing cache."""
    hydra = actor_model(family, dtype)
    draw_in_tiles = sampling.draw_in_tiles
    seen: list[Tensor] = []

    def record(head, states, *args, **kwargs):
        seen.append(states.clone())
        return draw_in_tiles(head, states, *args, **kwargs)

    monkeypatch.setattr(sampling, "draw_in_tiles", record)
    ours = respond(hydra, StageLimits(micro_batch_tokens=1))
    states = seen.copy()
    seen.clear()
    monkeypatch.setattr(slots, "PreallocatedCache", GrowingCache)
    theirs = respond(hydra, StageLimits(micro_batch_tokens=1))
    assert torch.equal(ours.batch.tokens, theirs.batch.tokens)
    assert len({len(step) for step in states}) > 2, "rows should leave the batch more than once"
    assert len(states) == len(seen) == LIMIT
    for step, reference in zip(states, seen, strict=True):
        assert torch.equal(step, reference)


@pytest.mark.skipif(not ask_the_machine(torch.device("cpu")), reason="this CPU has no bfloat16 units")
@pytest.mark.parametrize("engine", ["slots", "generate"])
def test_weights_in_tiles_change_no_bit(family: str, engine: str, monkeypatch: pytest.MonkeyPatch):
    hydra, limits = actor_model(family, torch.bfloat16), StageLimits(micro_batch_tokens=1)
    before = {name: parameter.clone() for name, parameter in hydra.named_parameters()}
    plain = respond(hydra, limits, engine=engine)
    counted = count_packed(monkeypatch)
    assert respond(hydra, limits, engine=engine).texts == plain.texts
    assert counted == [0], "so few steps do not pay"
    monkeypatch.setattr(sample, "MIN_STEPS", LIMIT)
    found = respond(hydra, limits, engine=engine)
    assert torch.equal(found.batch.tokens, plain.batch.tokens)
    assert torch.equal(found.logprobs, plain.logprobs)
    lora_linears = hydra.trunk("hydra").lora_linears.values()
    groups = {id(m.shared) for m in lora_linears if type(m.linear) is nn.Linear}
    assert counted[0] >= found.batch.response_mask.shape[1] * len(groups)
    assert all(torch.equal(parameter, before[name]) for name, parameter in hydra.named_parameters())


def count_packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many products were taken from tiles, as a list of one number; the machine's own units are asked for."""
    monkeypatch.setattr(device, "has_bfloat16_units", ask_the_machine)
    counted, real = [0], Tiles.product

    def count(tiles: Tiles, x: Tensor) -> Tensor:
        counted[0] += 1
        return real(tiles, x)

    monkeypatch.setattr(Tiles, "product", count)
    return counted


def test_the_cache_holds_the_planned_bytes_and_dies_with_the_sampling(family: str, monkeypatch: pytest.MonkeyPatch):
    hydra = actor_model(family)
    made: list[weakref.ref[PreallocatedCache]] = []
    sizes: list[int] = []

    class Watched(PreallocatedCache):
        """Says how large it is."""

        def __init__(self, num_columns: int, num_rows: int) -> None:
            super().__init__(num_columns, num_rows)
            made.append(weakref.ref(self))

        def drop_before(self, column: int) -> None:
            super().drop_before(column)
            sizes.append(self.num_bytes)

    monkeypatch.setattr(slots, "PreallocatedCache", Watched)
    gc.disable()  # it must not take the collector to free it before scoring begins
    try:
        responses = respond(hydra, StageLimits(micro_batch_tokens=1, rollout_rows=6))
        assert [reference() for reference in made] == [None]
    finally:
        gc.enable()
    config = CONFIGS[family]
    expected = cache_bytes(
        num_rows=6,
        num_columns=responses.batch.num_prompt_columns + LIMIT,
        num_layers=2,
        num_kv_heads=getattr(config, "num_key_value_heads", 2),
        head_dim=8,
        itemsize=4,
    )
    assert sizes[0] == 0
    assert set(sizes[1:]) == {expected}


def test_rows_are_halved_where_memory_runs_out(family: str, monkeypatch: pytest.MonkeyPatch):
    """In the middle of decoding, with every number of slots above three: the same responses."""
    hydra = actor_model(family)
    expected = respond(hydra, StageLimits(micro_batch_tokens=1))
    trunk = hydra.trunk("hydra")
    hidden_states = trunk.hidden_states
    sizes: list[int] = []
    num_steps = 0

    def run_out(tokens, attention_mask, **arguments):
        nonlocal num_steps
        num_steps = num_steps + 1 if tokens.shape[1] == 1 else 0
        sizes.append(len(tokens))
        if max(sizes) > 3 and num_steps == 4:
            sizes.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden_states(tokens, attention_mask, **arguments)

    monkeypatch.setattr(trunk, "hidden_states", run_out)
    limits = StageLimits(micro_batch_tokens=1)
    found = respond(hydra, limits)
    assert torch.equal(found.batch.tokens, expected.batch.tokens)
    assert found.texts == expected.texts
    assert max(sizes) <= 3
    assert (limits.rollout_rows, limits.num_retries) == (3, 2)


def test_logits_are_made_of_last_positions_only(family: str):
    """No tensor with the vocabulary as its last dimension has more rows than the batch."""
    hydra = actor_model(family)
    rows: list[int] = []

    class Rows(TorchDispatchMode):
        """Rows of every float tensor as wide as the vocabulary."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and made.dim() > 1 and made.shape[-1] == VOCAB and made.is_floating_point():
                rows.append(made.numel() // VOCAB)
            return made

    with Rows():
        respond(hydra, StageLimits(micro_batch_tokens=1), num_prompts=4)
    # The head's weight, [v, h], turns up as [h, v] inside the product: h rows.
    h = hydra.trunk("hydra").hidden_size
    assert set(rows) - {h} <= {1, 2, 3, 4}
    assert 4 in rows


def test_an_evaluation_holds_no_more_rows_than_a_rollout(monkeypatch: pytest.MonkeyPatch):
    """Twelve held-out prompts where a rollout has four."""
    hydra = actor_model("llama")
    trunk = hydra.trunk("hydra")
    hidden_states = trunk.hidden_states
    sizes: list[int] = []

    def watch(tokens, attention_mask, **arguments):
        if "cache" in arguments and tokens.shape[1] > 1:
            sizes.append(len(tokens))
        return hidden_states(tokens, attention_mask, **arguments)

    monkeypatch.setattr(trunk, "hidden_states", watch)
    config = ppo_config(rollout_batch_size=4, minibatch_size=4)
    sample_and_score(hydra, chat(hydra), "actor", prompts(12), config, stream=(0, "test"), reward_fn=None)
    assert max(sizes) == 4
    assert sum(sizes) == 12
