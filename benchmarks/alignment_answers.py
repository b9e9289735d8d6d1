"""Answers of every system of one seed to the study's held-out prompts, with gold, learned score and KL. One process.

    python benchmarks/alignment_answers.py WORK --seed 0 --players '[{"name": "hydra-ppo", "run": "hydra-ppo", ...}]'

All policies draw their tokens from the same uniform numbers, so two that are equal give equal answers. Writes
WORK/answers/NAME-sSEED.json; what is there already is not made again.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from alignment_systems import NUM_PROMPTS, PROMPT_SEED, TRL, Player

from hydra_rlhf.data.formats import TokenizedPrompt
from hydra_rlhf.data.sources import Prompt
from hydra_rlhf.data.world import gold_score, world_prompts
from hydra_rlhf.evaluation.best_of import best_of_n
from hydra_rlhf.model.export import load_peft_adapter
from hydra_rlhf.stages.finished import Finished, load_finished
from hydra_rlhf.stages.held_out import sample_and_score
from hydra_rlhf.stages.rollout import sequence_kl

STREAM = (PROMPT_SEED, "alignment study")
"""Names the uniform numbers of all answers."""


def main() -> None:
    """Let every player answer, one run in memory at a time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--players", required=True, help="JSON list of players")
    parser.add_argument("--num-prompts", type=int, default=NUM_PROMPTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    texts = world_prompts("test", args.num_prompts, PROMPT_SEED)
    for content in json.loads(args.players):
        player = Player(**content)
        out = args.work / "answers" / f"{player.name}-s{args.seed}.json"
        if out.exists():
            continue
        finished = load_player(args.work / "runs", player, args.seed)
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = out.with_suffix(".draft")  # renamed when whole
        draft.write_text(json.dumps(answer(finished, player, texts)) + "\n", encoding="utf-8")
        draft.rename(out)


def load_player(runs: Path, player: Player, seed: int) -> Finished:
    """The run that holds a player's policy; of TRL's, the base it was trained on with its LoRA set as the actor's."""
    finished = load_finished(runs / f"{player.run}-s{seed}", "last")
    if player.adapter:
        model = finished.model
        actor = model.table["actor"]
        load_peft_adapter(model.trunk(actor.trunk), TRL, runs / f"{player.name}-s{seed}" / "actor")
        model.table = {**model.table, "actor": replace(actor, adapter=TRL)}
    return finished


def answer(finished: Finished, player: Player, texts: list[str]) -> dict[str, Any]:
    """One player's answers and what they are worth."""
    prompts, _ = finished.chat.tokenize_prompts(Prompt(text) for text in texts)
    started = time.perf_counter()
    found = best_of(finished, prompts, player.best_of) if player.best_of else sample(finished, player.role, prompts)
    seconds = time.perf_counter() - started
    gold = [gold_score(text, response) for text, response in zip(texts, found["texts"], strict=True)]
    return {"gold": gold, "seconds": seconds, **found}


def sample(finished: Finished, role: str, prompts: list[TokenizedPrompt]) -> dict[str, Any]:
    """One sample for each prompt; a start has no KL."""
    config = finished.run.recipe.ppo
    rollout = sample_and_score(
        finished.model, finished.chat, role, prompts, config, stream=STREAM, reward_fn=None, limits=finished.limits
    )
    return {
        "texts": rollout.responses,
        "score": rollout.scores.tolist() if "reward" in finished.model.table else None,
        "kl": sequence_kl(rollout).mean().item() if role == "actor" else 0.0,
        "num_tokens": rollout.batch.response_mask.sum(dim=1).tolist(),
        "eos_frac": rollout.ended.float().mean().item(),
    }


def best_of(finished: Finished, prompts: list[TokenizedPrompt], n: int) -> dict[str, Any]:
    """The best of n samples of the start by its reward head; the KL is the known upper bound."""
    answers = best_of_n(finished, prompts, n, seed=PROMPT_SEED)
    return {
        "texts": list(answers.texts),
        "score": None,
        "kl": answers.notes["kl_bound"],
        "num_tokens": list(answers.num_tokens),
        "eos_frac": sum(answers.ended) / len(prompts),
    }


if __name__ == "__main__":
    main()
