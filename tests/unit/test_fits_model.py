"""Data that a model has no room for is refused before anything is trained: ids, learned positions, ranks."""

import re

import pytest
import torch
from contract.tiny import tiny_hydra, tokenizer
from smoke.tiny_runs import metric_lines, recipe
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from hydra_rlhf.api import train_hydra_sft, train_ppo
from hydra_rlhf.config import HydraSFTConfig, LoraConfig, PPOConfig, SamplingConfig
from hydra_rlhf.data.formats import TokenizedPair, TokenizedPrompt
from hydra_rlhf.data.sources import PreferencePair
from hydra_rlhf.errors import ConfigError, ModelError, OutOfMemoryError
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.roles import ROLES
from hydra_rlhf.model.trunk import Trunk
from hydra_rlhf.runtime.optimizer import Optimizer
from hydra_rlhf.stages.fits_model import check_examples, check_prompts, learned_positions
from hydra_rlhf.stages.limits import StageLimits
from hydra_rlhf.stages.pipeline import run_recipe

SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "max_position_embeddings": 24}


def trunk_of(family: str, vocab: int = 300) -> Trunk:
    """A tiny model of a family with 24 positions."""
    if family == "gpt2":
        config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=24, vocab_size=vocab, eos_token_id=2)
        return Trunk(GPT2LMHeadModel(config))
    if family == "opt":
        return Trunk(OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=16, word_embed_proj_dim=16, vocab_size=vocab)))
    return Trunk(LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=16, vocab_size=vocab)))


def hydra_of(family: str, vocab: int = 300) -> HydraModel:
    """Hydra-PPO on it."""
    return HydraModel(ROLES["hydra-ppo"], {"hydra": trunk_of(family, vocab)}, tokenizer(), lora=LoraConfig(rank=2))


def pair(prompt: int, chosen: int, rejected: int) -> TokenizedPair:
    """A pair of these lengths."""
    return TokenizedPair([5] * prompt, [6] * chosen, [7] * rejected)


@pytest.mark.parametrize(("family", "positions"), [("gpt2", 24), ("opt", 24), ("llama", None)])
def test_positions_are_learned_or_computed(family: str, positions: int | None):
    assert learned_positions(trunk_of(family)) == positions


def test_more_tokens_than_positions():
    hydra = hydra_of("gpt2")
    # 20 + 4 = 24 fit; the longest prompt and the longest response of different rows count, as they share a batch.
    check_examples(hydra, [pair(20, 4, 2), pair(3, 2, 4)])
    with pytest.raises(
        ConfigError, match=r"learned 24 positions.*\(20 tokens\).*response \(5\) takes 25; lower data\.max"
    ):
        check_examples(hydra, [pair(20, 1, 1), pair(3, 2, 5)])
    check_prompts(hydra, [TokenizedPrompt([5] * 18, "")], 6)
    with pytest.raises(
        ConfigError, match=r"sampled response \(7\) takes 25; lower .* ppo\.sampling\.max_response_tokens"
    ):
        check_prompts(hydra, [TokenizedPrompt([5] * 18, "")], 7)
    check_prompts(hydra_of("llama"), [TokenizedPrompt([5] * 18, "")], 700)
    check_prompts(hydra, [], 700)


def test_ids_without_a_row_in_the_embedding():
    hydra = hydra_of("llama", vocab=100)
    check_prompts(hydra, [TokenizedPrompt([99], "")], 4)
    with pytest.raises(ModelError, match=r"gives id 100, but the model's embedding has 100 rows"):
        check_prompts(hydra, [TokenizedPrompt([3, 100], "")], 4)
    for side in ({"chosen_ids": [100]}, {"rejected_ids": [100]}, {"prompt_ids": [100]}):
        ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]} | side
        with pytest.raises(ModelError, match="gives id 100"):
            check_examples(hydra, [TokenizedPair(**ids)])


def test_the_python_functions_ask_too():
    hydra = hydra_of("gpt2")
    long = "the cat " * 40
    with pytest.raises(ConfigError, match="learned 24 positions"):
        train_hydra_sft(hydra, [PreferencePair(long, "a", "b")], HydraSFTConfig(batch_size=1))
    config = PPOConfig(rollout_batch_size=1, minibatch_size=1, sampling=SamplingConfig(max_response_tokens=30))
    with pytest.raises(ConfigError, match="learned 24 positions"):
        train_ppo(hydra, ["the cat"], config)


def test_a_rank_that_no_matrix_has():
    hydra = tiny_hydra("hydra-ppo")
    full = max(min(linear.linear.weight.shape) for linear in hydra.trunk("hydra").lora_linears.values())
    hydra.lora = LoraConfig(rank=full)
    check_prompts(hydra, [TokenizedPrompt([5], "")], 1)
    hydra.lora = LoraConfig(rank=full + 1)
    with pytest.raises(ConfigError, match=rf"lora\.rank={full + 1} is above .*at most {full}$"):
        check_prompts(hydra, [TokenizedPrompt([5], "")], 1)
    check_prompts(tiny_hydra("ppo"), [TokenizedPrompt([5], "")], 1)  # adapts nothing


def test_limits_of_a_run_that_is_taken_up_only_shrink():
    kept = StageLimits(micro_batch_tokens=100, rollout_rows=8, num_retries=2)
    assert kept.at_most(StageLimits(micro_batch_tokens=50, rollout_rows=9)) == StageLimits(
        micro_batch_tokens=50, rollout_rows=8, num_retries=2
    )
    assert kept.at_most(StageLimits(micro_batch_tokens=200, rollout_rows=None)) == kept
    assert StageLimits(micro_batch_tokens=1).at_most(StageLimits(micro_batch_tokens=2)).rollout_rows is None


def test_out_of_memory_in_an_optimizer_step_says_what_to_do(tmp_path, monkeypatch):
    step, calls = Optimizer.step, []

    def failing(self, groups=None):
        calls.append(groups)
        if len(calls) == 6:  # stage 1 takes two
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore advice.")
        return step(self, groups)

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", failing)
        words = "(CUDA out of memory. Tried to allocate 2.00 GiB.); free memory and go on with --resume"
        with pytest.raises(OutOfMemoryError, match=re.escape(words)):
            run_recipe(recipe(tmp_path))
    # With less memory and more steps than before: the run goes on, and its stages are planned anew.
    folder = run_recipe(recipe(tmp_path, memory__budget="500MiB", ppo__num_steps=3), resume=True)
    assert [line["step"] for line in metric_lines(folder) if line["stage"] == "ppo"] == [1, 2, 3]
