"""Every decode engine, for every family, against a reference that decodes each row alone, no cache."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from contract.tiny import FAMILIES, chat, prompts, randomise_adapters, tiny_hydra
from hydra_rlhf.config import SamplingConfig
from hydra_rlhf.errors import ModelError
from hydra_rlhf.model import graphs, slots
from hydra_rlhf.model.draw import restrict
from hydra_rlhf.model.generate_batch import AVAILABLE
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.sampling import SampledTokens, Sampling
from hydra_rlhf.model.slots import decode
from hydra_rlhf.records import PromptBatch
from hydra_rlhf.runtime.randomness import uniforms
from hydra_rlhf.stages.limits import StageLimits
from hydra_rlhf.stages.rollout import prompt_batch, sample_responses

LIMIT = 10
STOPS = tuple(range(2, 40))
"""Some of the vocabulary, so that rows end at different times."""
NOT_PAGED = ("opt", "gemma2")
"""Families that `generate_batch` refuses."""
WINDOWED = ("gemma2", "mistral")
"""Families whose attention looks back less far than these rollouts are wide, which `graphs` refuses."""
PLAIN = SamplingConfig(max_response_tokens=LIMIT, stop_token_ids=STOPS)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def actor_model(family: str) -> HydraModel:
    """A model whose actor is not its reference."""
    hydra = tiny_hydra("hydra-ppo", family)
    randomise_adapters(hydra, 0.1)
    return hydra


def tiny_batch(num_prompts: int = 6, samples: int = 2) -> PromptBatch:
    """Tiny prompts of unequal lengths, each several times."""
    return prompt_batch(prompts(num_prompts), range(num_prompts), samples, 0, torch.device("cpu"))


def draws_of(batch: PromptBatch, config: SamplingConfig) -> list[Tensor]:
    """The uniform numbers of each row."""
    keys = zip(batch.prompt_index.tolist(), batch.sample_index.tolist(), strict=True)
    return [uniforms(config.max_response_tokens, 0, "test", *key) for key in keys]


@torch.no_grad()
def plain_response(hydra: HydraModel, prompt: Tensor, draws: Tensor, config: SamplingConfig) -> tuple[list[int], list]:
    """One row: each token from a pass over all before it; ids and their log-probs."""
    role = hydra.table["actor"]
    trunk = hydra.trunk(role.trunk)
    ids, logprobs = prompt.tolist(), []
    for t, u in enumerate(draws):
        tokens = torch.tensor([ids])
        hidden = trunk.hidden_states(tokens, torch.ones_like(tokens, dtype=torch.bool), adapter=role.adapter)
        logits = trunk.lm_head.logits(hidden[:, -1]) / config.temperature
        logprobs.append(logits.log_softmax(-1)[0])
        if t + 1 < config.min_response_tokens:
            logits[:, list(STOPS)] = -torch.inf
        cumulative = restrict(logits, config).double().softmax(-1).cumsum(-1)[0]
        token = int(torch.searchsorted(cumulative, float(u) * cumulative[-1], right=True))
        logprobs[-1] = logprobs[-1][token].item()
        ids.append(token)
        if token in STOPS:
            break
    return ids[len(prompt) :], logprobs


def respond(hydra: HydraModel, batch: PromptBatch, config: SamplingConfig, rows: int | None = None):
    """The actor's responses, with at most `rows` decoded together."""
    limits = StageLimits(micro_batch_tokens=1, rollout_rows=rows)
    return sample_responses(hydra, chat(hydra), "actor", batch, config, stream=(0, "test"), limits=limits)


CONFIGS = [
    PLAIN,
    SamplingConfig(max_response_tokens=LIMIT, stop_token_ids=STOPS, temperature=0.7, top_p=0.8, min_p=0.02),
    SamplingConfig(max_response_tokens=LIMIT, stop_token_ids=STOPS, min_response_tokens=4, top_k=50),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["plain", "cut", "min"])
def test_every_engine_and_number_of_slots_gives_what_each_row_gives_alone(family: str, config: SamplingConfig):
    hydra, batch = actor_model(family), tiny_batch()
    alone = [
        plain_response(hydra, row[keep], draws, config)
        for row, keep, draws in zip(batch.tokens, batch.attention_mask, draws_of(batch, config), strict=True)
    ]
    lengths = {len(ids) for ids, _ in alone}
    assert len(lengths) > 2, "rows should end at different times"
    runs = [("slots", None), ("slots", 5), ("slots", 1), ("generate", None), ("generate", 5)]
    if family not in WINDOWED:
        runs += [("graphs", None), ("graphs", 5)]
    if AVAILABLE and family not in NOT_PAGED:
        runs.append(("generate_batch", 5))
    for engine, rows in runs:
        found = respond(hydra, batch, with_engine(config, engine), rows)
        assert found.batch.response_mask.shape[1] == max(lengths)
        for row, (ids, logprobs) in enumerate(alone):
            keep = found.batch.response_mask[row]
            tokens = found.batch.tokens[row, batch.tokens.shape[1] :]
            assert tokens[keep].tolist() == ids, (engine, rows)
            assert_close(found.logprobs[row][keep], torch.tensor(logprobs), atol=1e-5, rtol=1e-5)
            assert (tokens[~keep] == 0).all()
            assert (found.logprobs[row][~keep] == 0).all()
            assert bool(found.ended[row]) == (ids[-1] in STOPS)


def with_engine(config: SamplingConfig, engine: str, **changes: object) -> SamplingConfig:
    """The same settings on another engine."""
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
    return SamplingConfig(**(fields | {"engine": engine} | changes))


class CountedPasses:
    """Rows of each pass over prompts, and how many decode steps there were."""

    def __init__(self, hydra: HydraModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompts: list[int] = []
        self.steps: list[int] = []
        trunk = hydra.trunk("hydra")
        hidden_states = trunk.hidden_states

        def count(tokens, attention_mask, **arguments):
            (self.steps if tokens.shape[1] == 1 else self.prompts).append(len(tokens))
            return hidden_states(tokens, attention_mask, **arguments)

        monkeypatch.setattr(trunk, "hidden_states", count)


def test_steps_of_fixed_shapes_read_more_columns_as_they_come(family: str, monkeypatch: pytest.MonkeyPatch):
    """Forty rows in three slots, through many numbers of columns and many shifts."""
    hydra, batch = actor_model(family), tiny_batch(num_prompts=10, samples=4)
    config = with_engine(PLAIN, "graphs")
    if family in WINDOWED:
        with pytest.raises(ModelError, match=r"engine=graphs: attention looks back 6 tokens.*use .*engine=slots"):
            respond(hydra, batch, config, 3)
        return
    monkeypatch.setattr(graphs, "BUCKET", 3)
    widths: list[int] = []
    fixed = graphs.FixedSlots._step

    def record(self: graphs.FixedSlots, width: int) -> None:
        widths.append(width)
        fixed(self, width)

    monkeypatch.setattr(graphs.FixedSlots, "_step", record)
    found, expected = respond(hydra, batch, config, 3), respond(hydra, batch, PLAIN, 3)
    assert torch.equal(found.batch.tokens, expected.batch.tokens)
    assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.ended, expected.ended)
    assert len(set(widths)) > 2
    assert any(later < earlier for earlier, later in pairwise(widths)), "columns should be used again"


@pytest.mark.parametrize("samples", [1, 4])
def test_a_step_changes_nothing_but_what_capturing_it_puts_back(samples: int, monkeypatch: pytest.MonkeyPatch):
    """Each step is run twice more first, as before a capture; put back, they leave no trace."""
    hydra, batch = actor_model("llama"), tiny_batch(num_prompts=3, samples=samples)
    fixed = graphs.FixedSlots._step

    def rehearsed(self: graphs.FixedSlots, width: int) -> None:
        kept = self._changed()
        before = [tensor.clone() for tensor in kept]
        for _ in range(graphs.WARM_UPS):
            fixed(self, width)
            for tensor, old in zip(kept, before, strict=True):
                tensor.copy_(old)
        fixed(self, width)

    expected = respond(hydra, batch, PLAIN)
    monkeypatch.setattr(graphs.FixedSlots, "_step", rehearsed)
    found = respond(hydra, batch, with_engine(PLAIN, "graphs"))
    assert torch.equal(found.batch.tokens, expected.batch.tokens)
    assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)


def test_samples_of_one_prompt_share_the_pass_over_it(monkeypatch: pytest.MonkeyPatch):
    hydra, batch = actor_model("llama"), tiny_batch(num_prompts=3, samples=4)
    passes = CountedPasses(hydra, monkeypatch)
    respond(hydra, batch, PLAIN)
    assert passes.prompts == [3]
    assert passes.steps[0] == 12


@pytest.mark.parametrize("num_slots", [2, 4, 16])
def test_slots_are_filled_again_so_that_steps_follow_the_sum_of_lengths(num_slots, monkeypatch: pytest.MonkeyPatch):
    """At most 1.1 x (sum of lengths / slots + longest)."""
    hydra, config = actor_model("llama"), SamplingConfig(max_response_tokens=60, stop_token_ids=tuple(range(2, 20)))
    batch = tiny_batch(num_prompts=12, samples=4)
    passes = CountedPasses(hydra, monkeypatch)
    lengths = respond(hydra, batch, config, num_slots).batch.response_mask.sum(1)
    assert lengths.max() > 4 * lengths.float().mean()
    assert len(passes.steps) <= 1.1 * (int(lengths.sum()) / num_slots + int(lengths.max()))
    assert sum(passes.prompts) <= 48
    # Without refill each group of rows would take as long as its longest.
    groups = -(-len(lengths) // num_slots)
    assert len(passes.steps) < 0.7 * groups * lengths.float().max()


@pytest.mark.parametrize("look_every", [1, 3, 100])
def test_looking_less_often_changes_no_token(family: str, look_every: int, monkeypatch: pytest.MonkeyPatch):
    hydra, batch = actor_model(family), tiny_batch()
    expected = respond(hydra, batch, PLAIN, 4)
    monkeypatch.setattr(slots, "LOOK_EVERY", {"cpu": look_every})
    found = respond(hydra, batch, PLAIN, 4)
    assert torch.equal(found.batch.tokens, expected.batch.tokens)
    assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.ended, expected.ended)


def test_columns_are_used_again(monkeypatch: pytest.MonkeyPatch):
    """Forty rows in three slots write many times the columns that the cache has; each row still gives its tokens."""
    hydra = actor_model("gemma2")  # with sliding windows
    batch = tiny_batch(num_prompts=10, samples=4)
    shifts: list[int] = []
    shift_left = slots.PreallocatedCache.shift_left
    monkeypatch.setattr(
        slots.PreallocatedCache,
        "shift_left",
        lambda self, num_columns: (shifts.append(num_columns), shift_left(self, num_columns)),
    )
    found, expected = respond(hydra, batch, PLAIN, 3), respond(hydra, batch, PLAIN)
    assert shifts
    assert min(shifts) > 0
    assert torch.equal(found.batch.tokens, expected.batch.tokens)
    assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("engine", "look_every"),
    [
        ("slots", 1),
        ("slots", 4),
        ("generate", 1),
        pytest.param("generate_batch", 1, marks=pytest.mark.skipif(not AVAILABLE, reason="needs newer transformers")),
    ],
)
def test_a_stop_string_ends_a_response_where_its_text_has_it(engine, look_every, monkeypatch: pytest.MonkeyPatch):
    hydra, batch = actor_model("llama"), tiny_batch(num_prompts=12)
    free = respond(hydra, batch, PLAIN)
    monkeypatch.setattr(slots, "LOOK_EVERY", {"cpu": look_every})
    decode_response = chat(hydra).decode_response
    string = max(free.texts, key=len)[2:4]
    assert len(string) == 2
    config = with_engine(PLAIN, engine, stop_strings=(string, "never there"))
    found = respond(hydra, batch, config, 4)
    cut = 0
    for row in range(len(free.texts)):
        before = free.batch.tokens[row, batch.tokens.shape[1] :][free.batch.response_mask[row]].tolist()
        after = found.batch.tokens[row, batch.tokens.shape[1] :][found.batch.response_mask[row]].tolist()
        texts = [decode_response(before[:n], ()) for n in range(1, len(before) + 1)]
        expected = next((n for n, text in enumerate(texts, 1) if string in text), len(before))
        assert after == before[:expected]
        assert string not in found.texts[row]
        if string in texts[expected - 1]:
            cut += 1
            assert found.ended[row]
            assert texts[expected - 1].startswith(found.texts[row] + string)
    assert 0 < cut < len(free.texts)


def test_a_sampling_that_is_stopped_goes_on_with_what_is_left():
    """Rows that were finished stay so; the others give the same tokens on a second attempt, with other slots."""
    hydra, batch = actor_model("llama"), tiny_batch()
    expected = respond(hydra, batch, PLAIN)
    calls = 0

    def stop_once() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise MemoryError

    role = hydra.table["actor"]
    sampling = Sampling(
        trunk=hydra.trunk(role.trunk),
        adapter=role.adapter,
        prompts=batch.tokens,
        prompt_mask=batch.attention_mask,
        uniforms=torch.stack(draws_of(batch, PLAIN)),
        config=PLAIN,
        stop_ids=STOPS,
        pad_id=0,
        after_token=stop_once,
    )
    with pytest.raises(MemoryError):
        decode(sampling, 6)
    assert 0 < sum(sampling.finished) < len(sampling.finished)
    decode(sampling, 2)
    found: SampledTokens = sampling.result()
    assert torch.equal(found.tokens, expected.batch.tokens[:, batch.tokens.shape[1] :])
    assert torch.equal(found.mask, expected.batch.response_mask)


def test_one_token_is_a_response(family: str):
    hydra, batch = actor_model(family), tiny_batch()
    config = SamplingConfig(max_response_tokens=1, stop_token_ids=STOPS)
    found = respond(hydra, batch, config, 4)
    assert found.batch.response_mask.shape == (12, 1)
    assert found.batch.response_mask.all()
