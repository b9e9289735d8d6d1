"""The Python functions on a tiny model: both stages in memory."""

import pytest
import torch
from contract.tiny import tiny_hydra, tokenizer
from peft import AutoPeftModelForCausalLM

import hydra_rlhf
from hydra_rlhf import (
    HydraModel,
    HydraSFTConfig,
    PPOConfig,
    PreferenceConfig,
    PreferencePair,
    SamplingConfig,
    save_model,
    train_hydra_sft,
    train_ppo,
    train_preferences,
)
from hydra_rlhf.errors import ConfigError
from hydra_rlhf.model.roles import HYDRA_PPO, without_roles

PAIRS = [
    PreferencePair(prompt=f"the {noun} sat on", chosen=f" the {noun}", rejected=" a dog ran")
    for noun in ("cat", "mat", "hat", "rat", "bat", "fat")
]
PPO = PPOConfig(
    num_steps=2,
    rollout_batch_size=4,
    minibatch_size=4,
    eval_every=1,
    num_eval_prompts=2,
    sampling=SamplingConfig(max_response_tokens=5),
)


def test_every_public_name_can_be_imported():
    assert all(hasattr(hydra_rlhf, name) for name in hydra_rlhf.__all__)
    assert set(hydra_rlhf.__all__) == set(hydra_rlhf._HOME)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hydra_rlhf.nothing  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # peft calls the old name
def test_both_stages_in_memory(tuning: str, tmp_path):
    model = tiny_hydra("hydra-ppo")
    before = {name: p.clone() for name, p in model.trunk("hydra").base_parameters().items()}
    config = HydraSFTConfig(tuning=tuning, num_epochs=8, batch_size=3, learning_rate=2e-2, eval_every=4)
    history = train_hydra_sft(model, PAIRS, config, held_out=PAIRS[:2])
    assert len(history) == 16
    assert history[-1]["loss/total"] < history[0]["loss/total"]
    assert "eval/perplexity" in history[-1]
    after = model.trunk("hydra").base_parameters()
    assert any(not torch.equal(after[name], before[name]) for name in before)

    # Chosen responses average zero on the training split, and the critic starts as the reward model.
    reward, value = model.scalar_head("hydra", "reward"), model.scalar_head("hydra", "value")
    assert torch.equal(reward.weight, value.weight)
    assert torch.equal(reward.bias, value.bias)

    frozen = {name: p.clone() for name, p in model.trunk("hydra").base_parameters().items()}
    steps = train_ppo(model, [pair.prompt for pair in PAIRS], PPO, held_out=["the cat sat on"])
    assert len(steps) == 2
    assert "eval/score" in steps[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.trunk("hydra").base_parameters().items())

    # What is saved is what was trained: base and adapter together say what the actor says.
    save_model(model, tmp_path / "out")
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "actor")
    ids = torch.tensor([[1, 7, 8, 9]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    trunk = model.trunk("hydra")
    ours = trunk.lm_head.logits(trunk.hidden_states(ids, mask, adapter="actor")[0])
    torch.testing.assert_close(theirs(input_ids=ids).logits[0], ours, atol=1e-4, rtol=1e-4)
    loaded = HydraModel.from_pretrained(str(tmp_path / "out" / "base"))
    assert torch.equal(loaded.scalar_head("hydra", "reward").bias, model.scalar_head("hydra", "reward").bias)


def test_chosen_responses_average_zero_after_stage_1():
    from hydra_rlhf.api import chat_for
    from hydra_rlhf.data.collate import collate_pairs

    model = tiny_hydra("hydra-ppo")
    train_hydra_sft(model, PAIRS, HydraSFTConfig(num_epochs=2, batch_size=3, learning_rate=1e-2))
    pairs, _ = chat_for(model, [], None).tokenize_pairs(PAIRS)
    scores = model.evaluate(collate_pairs(pairs), ["reward"])["reward"].scores
    assert scores is not None
    assert abs(scores[: len(pairs)].mean().item()) < 1e-5


def test_a_reward_function_alone_needs_no_reward_role_and_the_value_head_starts_at_zero():
    base = tiny_hydra("hydra-ppo").trunk("hydra").plain_copy()
    model = HydraModel(without_roles(HYDRA_PPO, "reward"), {"hydra": base}, tokenizer())
    assert not model.scalar_head("hydra", "value").weight.any()
    with pytest.raises(ConfigError, match="give train_ppo a reward_fn"):
        train_ppo(model, ["the cat"], PPO)
    seen: list[str] = []

    def longest(prompts: list[str], responses: list[str]) -> list[float]:
        seen.extend(prompts)
        return [float(len(response)) for response in responses]

    history = train_ppo(model, ["the cat", "a dog"], PPO, reward_fn=longest)
    assert set(seen) == {"the cat", "a dog"}
    assert history[0]["score/mean"] > 0


@pytest.mark.parametrize("method", ["dpo", "simpo"])
def test_preference_training_in_memory(method: str):
    model = tiny_hydra(method)
    frozen = {name: p.clone() for name, p in model.trunk("sft").base_parameters().items()}
    config = PreferenceConfig(num_epochs=4, batch_size=3, learning_rate=2e-2, eval_every=4)
    history = train_preferences(model, PAIRS, config, method=method, held_out=PAIRS[:2])
    assert len(history) == 8
    assert history[-1]["loss/preference"] < history[0]["loss/preference"]
    assert history[-1]["eval/pair_accuracy"] == 1
    assert all(torch.equal(p, frozen[name]) for name, p in model.trunk("sft").base_parameters().items())


def test_preference_training_is_for_models_made_for_it():
    for model, method in ((tiny_hydra("hydra-ppo"), "dpo"), (tiny_hydra("dpo"), "hydra-ppo")):
        with pytest.raises(ConfigError, match="needs method=dpo or simpo"):
            train_preferences(model, PAIRS, method=method)


def test_separate_models_are_trained_by_a_recipe():
    with pytest.raises(ConfigError, match="share one trunk"):
        train_hydra_sft(tiny_hydra("lora-ppo"), PAIRS)
