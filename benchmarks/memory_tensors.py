"""Exact tensor bytes of one run in each phase, from this program's own tracking. One process, one run, one JSON line.

    python benchmarks/memory_tensors.py WORK_FOLDER RUN --batch 16 --response 64 --micro 4 --rank 16 --updates 2

RUN is `hydra-ppo`, `no-critic` (the same without the critic's row) or `full-sft` (all weights, no adapter, no heads).
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from memory_workload import PROMPT_TOKENS, Workload, recipe

from hydra_rlhf.config import DataConfig, LoraConfig, ModelConfig, PPOConfig, SupervisedConfig
from hydra_rlhf.data.formats import ChatFormat, TokenizedDemonstration, chat_format
from hydra_rlhf.data.sources import load_pairs
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.load import load_tokenizer, load_trunk
from hydra_rlhf.model.roles import ROLES, STAGE1_TABLES, without_roles
from hydra_rlhf.runtime.measure import PhaseMemory
from hydra_rlhf.stages import sft
from hydra_rlhf.stages.ppo import train_ppo_stage
from hydra_rlhf.stages.session import Session
from hydra_rlhf.stages.supervised import train_supervised


def model_config(work: Path) -> ModelConfig:
    """The workload's model in float32 on the CPU."""
    return ModelConfig(path=str(work / "model"), dtype="float32", device="cpu", offline=True)


def chat_and_data(model: HydraModel, work: Path, workload: Workload) -> tuple[ChatFormat, DataConfig]:
    """How texts become ids, with the workload's limits."""
    data = DataConfig(max_prompt_tokens=PROMPT_TOKENS, max_response_tokens=workload.response)
    rows = load_pairs(str(work / "pairs.jsonl"), data)
    return chat_format(data, model.tokenizer, rows.prompts, eos_id=model.eos_id), data


def run_ppo(session: Session, work: Path, workload: Workload, checkpointing: str, *, with_critic: bool) -> None:
    """PPO as the recipe of the peers' comparison has it, with or without the critic's row."""
    table = ROLES["hydra-ppo"] if with_critic else without_roles(ROLES["hydra-ppo"], "critic")
    settings = recipe(work, workload, checkpointing=checkpointing, budget="auto", name="tensors")
    estimator = "gae" if with_critic else "reinforce++"
    lora, config = LoraConfig(**settings["lora"]), PPOConfig(**settings["ppo"] | {"advantage_estimator": estimator})
    folders = {"hydra_sft": str(work / "model")}
    model = HydraModel.from_stage1(table, folders, model=model_config(work), lora=lora, seed=0)
    if checkpointing == "layers":
        model.enable_checkpointing()
    chat, data = chat_and_data(model, work, workload)
    prompts, _ = chat.tokenize_prompts(load_pairs(str(work / "pairs.jsonl"), data).prompts)
    train_ppo_stage(session, model, chat, prompts, config, seed=0)


def run_full_sft(session: Session, work: Path, workload: Workload, checkpointing: str) -> None:
    """SFT of all weights on examples of up to the same length, with the same padded tokens per forward."""
    trunk = load_trunk(str(work / "model"), model_config(work))
    if checkpointing == "layers":
        trunk.enable_checkpointing()
    table = STAGE1_TABLES["sft"]
    name = next(iter(table.values())).trunk
    model = HydraModel(table, {name: trunk}, load_tokenizer(str(work / "model"), model_config(work)))
    chat, data = chat_and_data(model, work, workload)
    pairs, _ = chat.tokenize_pairs(load_pairs(str(work / "pairs.jsonl"), data).rows)
    examples = [full_length(TokenizedDemonstration(pair.prompt_ids, pair.chosen_ids), workload) for pair in pairs]
    config = SupervisedConfig(
        num_epochs=workload.updates * workload.batch / len(examples),
        batch_size=workload.batch,
        micro_batch_tokens=workload.micro_batch_tokens,
        eval_every=0,
        save_every=0,
    )
    train_supervised(session, model, examples, config, stage="sft", loss=sft.loss, lora=LoraConfig(), seed=0)


def full_length(example: TokenizedDemonstration, workload: Workload) -> TokenizedDemonstration:
    """The example with its response repeated up to the workload's length, so that forwards are as full as PPO's."""
    ids = list(example.response_ids)
    repeats = -(-workload.response // len(ids))
    return replace(example, response_ids=(ids * repeats)[: workload.response])


RUNS: dict[str, Callable[[Session, Path, Workload, str], None]] = {
    "hydra-ppo": lambda session, work, workload, policy: run_ppo(session, work, workload, policy, with_critic=True),
    "no-critic": lambda session, work, workload, policy: run_ppo(session, work, workload, policy, with_critic=False),
    "full-sft": run_full_sft,
}


def main() -> None:
    """Run, and print what each phase held."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("--checkpointing", choices=["none", "layers"], default="none")
    for name in ("batch", "response", "micro", "rank", "updates"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    workload = Workload(
        shape="",
        batch=args.batch,
        response=args.response,
        micro=args.micro,
        rank=args.rank,
        updates=args.updates,
    )
    session = Session(memory=PhaseMemory(track_tensors=True))
    RUNS[args.run](session, args.work, workload, args.checkpointing)
    phases = {name: numbers["peak_tensor_bytes"] for name, numbers in session.memory.as_dict().items()}
    print(json.dumps({"run": args.run, "phases": phases, "peak_tensor_bytes": max(phases.values())}))


if __name__ == "__main__":
    main()
