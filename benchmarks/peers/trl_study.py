"""TRL's PPO (1.12.0, the last release that had it) as one system of the alignment study.

usage: trl_study.py INPUTS OUT --seed S --learning-rate R --kl-coef K
INPUTS is what `alignment_peer.py` wrote: the start, the reward model, the prompts and the workload that both sides
share. Policy and value model are trained in LoRA sets of the same rank; the value model starts as the reward model.
Writes the policy's LoRA set to OUT/actor (PEFT) and prints one JSON line: seconds of training, and what TRL logged.

What is TRL's own: one learning rate and one optimizer for both models, no gradient clipping, its own order of the
prompts. Its warm-up counts whole updates and would waste the first one on a rate of zero, so there is none. The
micro-batch is the minibatch, because with gradient accumulation TRL steps once a rollout batch, not once a minibatch.
"""
import argparse
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

LOGGED = (
    "objective/kl", "objective/scores", "val/num_eos_tokens", "val/ratio", "policy/clipfrac_avg", "loss/value_avg",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--kl-coef", type=float, required=True)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    workload = json.loads((args.inputs / "workload.json").read_text())
    trainer = build_trainer(args, workload)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.accelerator.unwrap_model(trainer.model).policy.save_pretrained(args.out / "actor")
    steps = [line for line in trainer.state.log_history if "objective/kl" in line]
    print(json.dumps({
        "seconds": seconds, "num_updates": len(steps), "num_samples": len(steps) * workload["rollout_batch_size"],
        "steps": [{name: line[name] for name in LOGGED} for line in steps]}))


def build_trainer(args, workload):
    tokenizer = AutoTokenizer.from_pretrained(args.inputs / "policy", padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(args.inputs / "policy", dtype=torch.float32)
    policy.generation_config.pad_token_id = policy.config.pad_token_id = tokenizer.pad_token_id

    def lora(task):
        return LoraConfig(r=workload["rank"], lora_alpha=workload["alpha"], lora_dropout=0.0,
                          target_modules="all-linear", task_type=task)

    rows = [json.loads(line) for line in (args.inputs / "prompts.jsonl").read_text().splitlines()]
    prompts = Dataset.from_list(rows)
    config = PPOConfig(
        output_dir=str(args.out / "trl"), seed=args.seed, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_steps=1, bf16=False, use_cpu=True, gradient_checkpointing=False, num_sample_generations=0,
        per_device_train_batch_size=workload["rollout_batch_size"], gradient_accumulation_steps=1,
        num_mini_batches=workload["num_minibatches"], num_ppo_epochs=workload["num_epochs"],
        total_episodes=workload["num_steps"] * workload["rollout_batch_size"],
        response_length=workload["response_tokens"], local_rollout_forward_batch_size=workload["rollout_batch_size"],
        temperature=workload["temperature"], stop_token="eos", missing_eos_penalty=None, kl_coef=args.kl_coef,
        kl_estimator="k1", cliprange=workload["clip_range"], cliprange_value=workload["value_clip_range"],
        gamma=workload["discount"], lam=workload["gae_lambda"], learning_rate=args.learning_rate,
        lr_scheduler_type="constant", adam_beta1=workload["adam_betas"][0], adam_beta2=workload["adam_betas"][1],
        weight_decay=0.0)
    return PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=None, reward_model=scorer(args.inputs),
        value_model=get_peft_model(scorer(args.inputs), lora("SEQ_CLS")), train_dataset=prompts,
        eval_dataset=prompts.select(range(8)), peft_config=lora("CAUSAL_LM"))


def scorer(inputs):
    """The reward model with the bias that its class has no place for, so that scores are the other side's."""
    model = AutoModelForSequenceClassification.from_pretrained(inputs / "reward", num_labels=1, dtype=torch.float32)
    head = nn.Linear(model.score.in_features, 1)
    with torch.no_grad():
        head.weight.copy_(model.score.weight)
        head.bias.fill_(model.config.reward_bias)
    model.score = head
    return model


if __name__ == "__main__":
    main()
