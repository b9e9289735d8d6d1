"""One tiny PPO step on random weights, measured against its plan: it corrects the plan on this machine."""

from dataclasses import replace

import torch

from hydra_rlhf.config import DataConfig, PPOConfig, Recipe, SamplingConfig
from hydra_rlhf.data.formats import TokenizedPrompt, chat_format
from hydra_rlhf.data.scratch_tokenizer import scratch_tokenizer
from hydra_rlhf.errors import ConfigError
from hydra_rlhf.memory.decide import planner_of, workload_of
from hydra_rlhf.memory.plan import Cuts, total
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.load import pick_device
from hydra_rlhf.model.roles import STAGE2, method_table, trunks
from hydra_rlhf.model.shapes import find_config, random_trunk, with_layers
from hydra_rlhf.runtime.measure import PhaseMemory
from hydra_rlhf.runtime.tensor_bytes import existing_bytes
from hydra_rlhf.stages.limits import StageLimits
from hydra_rlhf.stages.ppo import train_ppo_stage
from hydra_rlhf.stages.session import Session

NUM_LAYERS = 2
NUM_SEQUENCES = 4
PROMPT_TOKENS, RESPONSE_TOKENS = 96, 32
HELD = ("weights", "adapters", "gradients", "optimizer", "batch", "cache")
"""Parts that are counted and need no correction."""


def probe_step(recipe: Recipe, *, trust_remote_code: bool = False) -> dict[str, float]:
    """Measured over planned bytes of the activations and logits of each phase of stage 2.

    Runs `NUM_LAYERS` layers of the model's shape with random weights, on the recipe's device. On CUDA the allocator is
    asked, which also sees what kernels take for themselves; on the CPU every tensor is counted. Raises `ConfigError`
    for a method without PPO.
    """
    if STAGE2[recipe.method] != "ppo":
        raise ConfigError(f"--probe runs one PPO step, and method={recipe.method} has none; leave it out")
    config = with_layers(find_config(recipe.model, trust_remote_code=trust_remote_code), NUM_LAYERS)
    work = replace(
        workload_of(recipe),
        prompt_tokens=PROMPT_TOKENS,
        response_tokens=RESPONSE_TOKENS,
        num_sequences=NUM_SEQUENCES,
        minibatch_size=NUM_SEQUENCES,
    )
    cuts = Cuts(
        micro_batch_tokens=2 * (PROMPT_TOKENS + RESPONSE_TOKENS), rollout_rows=NUM_SEQUENCES, checkpointed_layers=0
    )
    table = method_table(recipe)
    planner = planner_of(recipe, config, work, optimizer=recipe.ppo.optimizer, below_rank=0)
    planned = planner.ppo(table, cuts)
    on_cpu = pick_device(recipe.model.device).type == "cpu"
    memory = PhaseMemory(track_tensors=on_cpu)
    others = existing_bytes() if on_cpu else torch.cuda.memory_allocated()
    base = random_trunk(config, recipe.model)
    names = trunks(table)
    copies = {name: base.plain_copy() for name in names[1:]}
    tokenizer = scratch_tokenizer(["a b c"], 300)
    model = HydraModel(table, {names[0]: base, **copies}, tokenizer, lora=recipe.lora)
    run_one_step(model, recipe, cuts, memory)
    key = "peak_tensor_bytes" if on_cpu else "cuda_peak_allocated_bytes"
    corrections: dict[str, float] = {}
    for phase, parts in planned.items():
        held = sum(parts[part] for part in HELD)
        rest, found = total(parts) - held, memory.as_dict()[phase][key] - others - held
        if on_cpu and phase == "update" and table["actor"].adapter is None and found > rest:
            # While tensors are counted autograd adds the two gradients of a tied weight up in a third tensor.
            found = max(rest, found - round(planner.simulation.tied_head_gradient()))
        corrections[phase] = found / rest if rest else 1.0
    return corrections


def run_one_step(model: HydraModel, recipe: Recipe, cuts: Cuts, memory: PhaseMemory) -> None:
    """One PPO step of full-length random prompts and responses."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        TokenizedPrompt(torch.randint(3, model.vocab_size, (PROMPT_TOKENS,), generator=generator).tolist(), f"{i}")
        for i in range(NUM_SEQUENCES)
    ]
    sampling = SamplingConfig(max_response_tokens=RESPONSE_TOKENS, min_response_tokens=RESPONSE_TOKENS)
    ppo = PPOConfig(
        num_steps=1,
        rollout_batch_size=NUM_SEQUENCES,
        minibatch_size=NUM_SEQUENCES,
        num_epochs=1,
        advantage_estimator="gae" if "critic" in model.table else "reinforce++",
        sampling=sampling,
        optimizer=recipe.ppo.optimizer,
        eval_every=0,
        num_logged_samples=0,
    )
    chat = chat_format(DataConfig(chat_template="none"), model.tokenizer, [], eos_id=model.eos_id)
    limits = StageLimits(micro_batch_tokens=cuts.micro_batch_tokens, rollout_rows=cuts.rollout_rows)
    train_ppo_stage(Session(memory=memory), model, chat, prompts, ppo, seed=0, limits=limits)
