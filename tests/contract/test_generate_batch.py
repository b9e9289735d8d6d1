"""Continuous batching of transformers as a decode engine: what it refuses, and what comes out of its thread."""

import threading

import pytest
import torch
from torch.testing import assert_close

from contract.test_decoding import PLAIN, actor_model, respond, tiny_batch, with_engine
from contract.tiny import chat, tiny_trunk
from hydra_rlhf.config import SamplingConfig
from hydra_rlhf.errors import Interrupted, ModelError
from hydra_rlhf.model import attention, generate_batch
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.sample import sample_tokens
from hydra_rlhf.model.trunk import Trunk
from hydra_rlhf.stages.limits import StageLimits
from hydra_rlhf.stages.rollout import sample_responses

CONFIG = with_engine(PLAIN, "generate_batch")
needs_new_transformers = pytest.mark.skipif(not generate_batch.AVAILABLE, reason="needs newer transformers")


def sample(trunk: Trunk) -> None:
    """A few tokens after one prompt."""
    prompts = torch.tensor([[3, 4, 5]])
    mask = torch.ones_like(prompts, dtype=torch.bool)
    sample_tokens(trunk, None, prompts, mask, torch.full((1, 4), 0.5), CONFIG, stop_ids=(2,), pad_id=0)


def as_before(hydra: HydraModel) -> bool:
    """Whether attention is what it was, no adapter is in use and no thread is left."""
    trunk = hydra.trunk("hydra")
    assert trunk.model.config._attn_implementation == attention.NAME
    return trunk.switch.stack == () and threading.active_count() == 1


@needs_new_transformers
def test_a_family_with_attention_of_its_own_is_refused():
    with pytest.raises(ModelError, match=r"engine=generate_batch: Gemma2ForCausalLM has attention of its own.*=slots"):
        sample(tiny_trunk("gemma2"))


@needs_new_transformers
def test_a_family_that_does_not_know_the_paged_cache_is_refused():
    with pytest.raises(ModelError, match=r"OPTForCausalLM cannot run on a paged cache \(.*get_seq_length.*=slots"):
        sample(tiny_trunk("opt"))


@needs_new_transformers
@pytest.mark.parametrize("step", [0, 1])
def test_a_model_that_gives_other_logits_on_a_paged_cache_is_refused(step):
    trunk, calls = tiny_trunk("llama"), []

    def scale(module, inputs, output) -> None:
        if len(calls) == step:
            output.logits.mul_(1.01)
        calls.append(1)

    trunk.model.register_forward_hook(scale)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM gives other logits on a paged cache.*=slots"):
        sample(trunk)


def test_a_transformers_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(generate_batch, "AVAILABLE", False)
    with pytest.raises(ModelError, match=r"needs transformers 5\.24 or newer.*engine=slots"):
        sample(tiny_trunk("llama"))


@needs_new_transformers
def test_memory_that_runs_out_in_the_thread_halves_the_rows(capfd: pytest.CaptureFixture):
    hydra, batch = actor_model("llama"), tiny_batch()
    expected = respond(hydra, batch, PLAIN)
    most: list[int] = []

    def fail_once(module, inputs, output) -> None:
        most.append(output.logits.shape[1])
        if len(most) == 6:
            raise torch.OutOfMemoryError("no more of it")

    hydra.trunk("hydra").model.register_forward_hook(fail_once)
    limits = StageLimits(micro_batch_tokens=1, rollout_rows=6)
    found = sample_responses(hydra, chat(hydra), "actor", batch, CONFIG, stream=(0, "test"), limits=limits)
    assert (limits.rollout_rows, limits.num_retries) == (3, 1)
    assert max(most[:6]) == 6
    assert max(most[6:]) == 3
    assert torch.equal(found.batch.tokens, expected.batch.tokens)
    assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)
    assert as_before(hydra)
    assert capfd.readouterr() == ("", "")


@needs_new_transformers
@pytest.mark.parametrize("error", [Interrupted(15), KeyboardInterrupt()], ids=["stopped", "interrupted"])
def test_a_stop_between_two_tokens_comes_out_of_the_thread(error: BaseException, capfd: pytest.CaptureFixture):
    hydra, calls = actor_model("llama"), []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise error

    limits = StageLimits(micro_batch_tokens=1)
    with pytest.raises(type(error)):
        sample_responses(
            hydra, chat(hydra), "actor", tiny_batch(), CONFIG, stream=(0, "test"), limits=limits, after_token=stop
        )
    assert len(calls) == 3
    assert as_before(hydra)
    assert capfd.readouterr() == ("", "")


@needs_new_transformers
def test_a_prompt_longer_than_a_pass_is_cut(monkeypatch: pytest.MonkeyPatch):
    from hydra_rlhf.model import continuous

    monkeypatch.setattr(continuous, "PASS_TOKENS", 4)
    hydra, batch = actor_model("llama"), tiny_batch()
    expected, found = respond(hydra, batch, PLAIN), respond(hydra, batch, CONFIG, 2)
    assert torch.equal(found.batch.tokens, expected.batch.tokens)
    assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)


@needs_new_transformers
def test_one_token_is_a_response():
    hydra, batch = actor_model("llama"), tiny_batch()
    config = SamplingConfig(max_response_tokens=1, stop_token_ids=(2,))
    found = respond(hydra, batch, with_engine(config, "generate_batch"), 5)
    assert torch.equal(found.batch.tokens, respond(hydra, batch, config).batch.tokens)
