"""PPO at GRPO's price, by the plan at the Llama-7B shape: what the critic's row costs at most."""

import pytest

from hydra_rlhf.config import DataConfig, LoraConfig, ModelConfig, PPOConfig, Recipe, SamplingConfig
from hydra_rlhf.memory.decide import planner_of, workload_of
from hydra_rlhf.memory.plan import Cuts, peak
from hydra_rlhf.model.roles import ROLES, without_roles
from hydra_rlhf.model.shapes import find_config


@pytest.mark.parametrize(("rows", "tokens", "recomputed"), [(16, 4096, 0), (16, 4096, 32), (4, 1024, 32)])
def test_a_critic_costs_a_twentieth_at_most(rows: int, tokens: int, recomputed: int):
    """Rank 16, 16 x (512 + 512) tokens, bf16: 1.017, 1.020 and 1.029 x."""
    model = ModelConfig(path="shape:llama-2-7b", dtype="bfloat16")
    ppo = PPOConfig(
        rollout_batch_size=16, minibatch_size=16, num_epochs=1, sampling=SamplingConfig(max_response_tokens=512)
    )
    data = DataConfig(max_prompt_tokens=512, max_response_tokens=512)
    recipe = Recipe(name="price", model=model, lora=LoraConfig(rank=16, alpha=32.0), data=data, ppo=ppo)
    planner = planner_of(recipe, find_config(model), workload_of(recipe), optimizer="adamw")
    cuts = Cuts(micro_batch_tokens=tokens, rollout_rows=rows, checkpointed_layers=recomputed)
    with_critic, without = (
        peak(planner.ppo(table, cuts)) for table in (ROLES["hydra-ppo"], without_roles(ROLES["hydra-ppo"], "critic"))
    )
    assert 1.0 < with_critic / without <= 1.05
