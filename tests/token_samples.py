"""Rows of samples.jsonl with tokens, as a run writes them, made up: for tests of the report and of its page."""

import random
import re
from typing import Any

PROMPT = "Customer {index}: my parcel has not arrived. When does the shop in Graz close on Friday?"
RESPONSES = (
    "Thank you for asking! The shop in Graz closes at 18:00 on Friday. Have a nice day.",
    "I am sorry about the parcel. It should arrive tomorrow; the shop in Graz is open until 18:00.",
    "The shop closes at six.\n\n1. Monday to Thursday: 18:00\n2. Friday: 18:00\n\nIs there anything else?",
    "We close at 18:00. Grüße aus Graz 🐙",
)
BEFORE = (
    "the shop closes. the shop closes at I am at 18:00 ok ok",
    "parcel is the parcel of Graz, and a shop of the customer, Friday, the the the",
)


def pieces_of(text: str) -> list[str]:
    """Words with the space before them, and line breaks, as a byte-level tokenizer cuts them."""
    return re.findall(r" ?[^\s]+|\s", text)


def token_record(
    text: str, noise: random.Random, *, ended: bool, names: tuple[str, ...], spread: float = 1.0
) -> dict[str, Any]:
    """Pieces that join to `text`, the octopus made of two tokens, the stop token, and `names` with a number each."""
    pieces: list[str] = []
    marks: dict[str, str] = {}
    for piece in pieces_of(text):
        if "🐙" in piece:
            marks[str(len(pieces))] = "<0xF0>"
            pieces.append("")
        pieces.append(piece)
    if ended:
        marks[str(len(pieces))] = "<eos>"
        pieces.append("")
    numbers = {name: [float(f"{noise.gauss(0, spread):.4g}") for _ in pieces] for name in names}
    if "logprob" in numbers:
        numbers["logprob"] = [-abs(value) for value in numbers["logprob"]]
    if "value" in numbers:
        numbers["value"] = [1.2 + 0.3 * value for value in numbers["value"]]
    return {"ids": [100 + place for place in range(len(pieces))], "pieces": pieces, "names": marks, **numbers}


def rollout_row(noise: random.Random, index: int, step: int) -> dict[str, Any]:
    """A rollout at a step, with everything that a method with a critic and a reference keeps."""
    text, ended = RESPONSES[index % 4], index % 5 != 4
    tokens = token_record(
        text, noise, ended=ended, names=("logprob", "kl", "value", "advantage", "reward", "change"), spread=0.6
    )
    return {
        "stage": "ppo",
        "step": step,
        "kind": "rollout",
        "prompt_index": index,
        "prompt": PROMPT.format(index=index),
        "response": text,
        "ended": ended,
        "score": round(noise.gauss(step / 30, 1), 4),
        "kl": round(sum(tokens["kl"]), 4),
        "tokens": tokens,
    }


def pair_row(noise: random.Random, index: int) -> dict[str, Any]:
    """A pair of the final comparison: actor and reference on one prompt."""
    row = rollout_row(noise, index, 60) | {"stage": "evaluation", "kind": "evaluation"}
    before, gain, gold = BEFORE[index % 2], noise.gauss(1.6, 1.1), noise.uniform(0.2, 0.7)
    names = ("logprob", "kl", "value")
    return row | {
        "tokens": token_record(row["response"], noise, ended=row["ended"], names=names),
        "reference_response": before,
        "reference_ended": True,
        "reference_tokens": token_record(before, noise, ended=True, names=names),
        "reference_score": round(row["score"] - gain, 4),
        "gold": round(gold + 0.1 * gain, 4),
        "reference_gold": round(gold, 4),
    }


def sample_rows(*, num_pairs: int = 12, steps: range = range(1, 61), per_step: int = 2) -> list[dict[str, Any]]:
    """What a run of 60 steps with two kept rollouts each, and a final comparison, leaves in samples.jsonl."""
    noise = random.Random(1)
    rollouts = [rollout_row(noise, per_step * step + place, step) for step in steps for place in range(per_step)]
    return rollouts + [pair_row(noise, index) for index in range(num_pairs)]
