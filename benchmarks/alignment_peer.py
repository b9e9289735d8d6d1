"""What TRL's PPO gets from a finished hydra-ppo run: its start, its reward head as a classifier, its prompts as ids.

    python benchmarks/alignment_peer.py RUN OUT

OUT/policy and OUT/reward are transformers folders. OUT/prompts.jsonl holds exactly the prompts that the run sampled
responses for, each as often as it did. OUT/workload.json holds the settings that both sides share; it is written last.
"""

import argparse
import json
import shutil
from pathlib import Path

from hydra_rlhf.model.export import save_reward_model
from hydra_rlhf.stages.datasets import load_raw
from hydra_rlhf.stages.finished import Finished, load_finished
from hydra_rlhf.stages.rollout import prompt_rows


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)  # what an interrupted study left
    args.out.mkdir(parents=True)
    finished = load_finished(args.run, "last")
    recipe, model = finished.run.recipe, finished.model
    assert recipe.start.hydra_sft is not None, "the study's runs start from a shared Hydra-SFT model"
    shutil.copytree(recipe.start.hydra_sft, args.out / "policy")
    trunk = model.table["reward"].trunk
    save_reward_model(model.trunk(trunk), model.scalar_head(trunk, "reward"), model.tokenizer, args.out / "reward")
    lines = [json.dumps({"input_ids": ids}) for ids in sampled_prompts(finished)]
    (args.out / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ppo = recipe.ppo
    workload = {
        "num_steps": ppo.num_steps,
        "rollout_batch_size": ppo.rollout_batch_size,
        "num_minibatches": ppo.rollout_batch_size // ppo.minibatch_size,
        "num_epochs": ppo.num_epochs,
        "response_tokens": ppo.sampling.max_response_tokens,
        "temperature": ppo.sampling.temperature,
        "clip_range": ppo.clip_range,
        "value_clip_range": ppo.value_clip_range,
        "gae_lambda": ppo.gae_lambda,
        "discount": ppo.discount,
        "adam_betas": ppo.adam_betas,
        "rank": recipe.lora.rank,
        "alpha": recipe.lora.alpha,
    }
    (args.out / "workload.json").write_text(json.dumps(workload, indent=1) + "\n", encoding="utf-8")


def sampled_prompts(finished: Finished) -> list[list[int]]:
    """Ids of the prompts of every PPO step of a run."""
    recipe = finished.run.recipe
    prompts, _ = finished.chat.tokenize_prompts(load_raw(recipe.data, seed=recipe.seed).ppo_prompts)
    steps = range(recipe.ppo.num_steps)
    rows = [
        row
        for step in steps
        for row in prompt_rows(len(prompts), recipe.ppo.rollout_batch_size, step, recipe.seed, "ppo")
    ]
    return [prompts[row].prompt_ids for row in rows]


if __name__ == "__main__":
    main()
