"""RLHF of a real pre-trained model towards happy endings: pairs sampled from it and labelled by a written rule.

    python benchmarks/stories.py --model MODEL_FOLDER --out benchmarks/results/stories.json

The model goes through the package as any hub model would: its folder is `model.path` of a recipe. The
openings of the final measurement are never trained on. The rule is in `story_rule.py`; training sees it only through
the pairs.
"""

import argparse
import itertools
import json
import math
import platform
import re
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from story_openings import split_openings
from story_rule import complete_sentences, happy_ending

from hydra_rlhf.config import (
    DataConfig,
    HydraSFTConfig,
    LoraConfig,
    ModelConfig,
    PPOConfig,
    Recipe,
    RuntimeConfig,
    SamplingConfig,
)
from hydra_rlhf.data.formats import TokenizedPrompt, chat_format
from hydra_rlhf.data.rows import Prompt
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.records import Rollout, TokenBatch
from hydra_rlhf.stages.finished import load_finished
from hydra_rlhf.stages.held_out import sample_and_score
from hydra_rlhf.stages.limits import DEFAULT_MICRO_BATCH_TOKENS, StageLimits
from hydra_rlhf.stages.pipeline import run_recipe
from hydra_rlhf.stages.rollout import prompt_batch, sample_responses, score_roles, sequence_kl

NUM_TOKENS = 64
"""Every response ends here; the model hardly ever stops sooner, so length cannot tell the sides of a pair apart."""
SAMPLING = SamplingConfig(max_response_tokens=NUM_TOKENS, temperature=0.8)
LENGTH_BIN = 5
"""Characters: pairs are balanced within bins of this width."""
NUM_SHOWN = 4


def sample_pairs(
    model_path: str, prompts: list[str], seed: int, stream: str
) -> tuple[list[dict[str, str]], dict[str, float]]:
    """Two samples of the model itself per opening, the one that ends happier chosen; and what the samples are like.

    The rule is asked about what training will see: the first `NUM_TOKENS` tokens. A little more is sampled and written,
    so that the package's own cut makes every response the same length, without a stop token in mid-sentence.
    Openings whose two endings the rule cannot tell apart give no pair, nor do samples that stopped early, and pairs are
    dropped until length says nothing about them (`balance_lengths`).
    """
    model = HydraModel.from_pretrained(model_path, with_reward=False)
    rows = [Prompt(prompt) for prompt in prompts]
    chat = chat_format(DataConfig(max_response_tokens=NUM_TOKENS), model.tokenizer, rows, eos_id=model.eos_id)
    tokenized, _ = chat.tokenize_prompts(rows)
    batch = prompt_batch(tokenized, range(len(tokenized)), 2, model.pad_id, model.device)
    sampling = replace(SAMPLING, max_response_tokens=NUM_TOKENS + 12)
    limits = StageLimits(micro_batch_tokens=DEFAULT_MICRO_BATCH_TOKENS, rollout_rows=256)
    texts = sample_responses(model, chat, "reference", batch, sampling, stream=(seed, stream), limits=limits).texts
    encoded = [chat.encode_response(text) for text in texts]
    seen = [chat.decode_response(ids, ()) for ids, _ in encoded]
    values = [happy_ending(text) for text in seen]
    lengths = [len(text) for text in seen]
    found: list[tuple[int, int]] = []
    for i in range(0, len(texts), 2):
        better, worse = sorted((i, i + 1), key=lambda j: -values[j])
        if values[better] > values[worse] and encoded[better][1] and encoded[worse][1]:
            found.append((better, worse))
    kept = balance_lengths(found, lengths)
    pairs = [{"prompt": prompts[b // 2], "chosen": texts[b], "rejected": texts[w]} for b, w in kept]
    sides = [j for pair in kept for j in pair]
    labels = [1.0, -1.0] * len(kept)
    words = [len(text.split()) for text in seen]
    numbers = {
        "openings": len(prompts),
        "samples": len(texts),
        "stopped_early": sum(not cut for _, cut in encoded),
        "rule_mean": statistics.fmean(values),
        "rule_std": statistics.pstdev(values),
        "rule_correlation_with_characters": statistics.correlation(values, lengths),
        "rule_correlation_with_words": statistics.correlation(values, words),
        "pairs_found": len(found),
        "pairs_kept": len(kept),
        "label_correlation_with_characters": statistics.correlation(labels, [lengths[j] for j in sides]),
        "label_correlation_with_words": statistics.correlation(labels, [words[j] for j in sides]),
        "longer_wins": longer_wins_share([lengths[b] - lengths[w] for b, w in kept]),
    }
    return pairs, numbers


def balance_lengths(pairs: list[tuple[int, int]], lengths: list[int]) -> list[tuple[int, int]]:
    """As many (better, worse) pairs whose better side is longer as pairs whose better side is shorter, in order.

    Held within bins of the difference in characters, so that nothing about length tells which side is better. The raw
    rule does go with characters a little: common words, happy ones too, need fewer tokens a letter.
    """
    groups: dict[tuple[int, bool], list[tuple[int, int]]] = {}
    for better, worse in pairs:
        difference = lengths[better] - lengths[worse]
        groups.setdefault((abs(difference) // LENGTH_BIN, difference > 0), []).append((better, worse))
    kept = set[tuple[int, int]]()
    for (size, positive), group in groups.items():
        kept.update(group[: len(groups.get((size, not positive), []))])
    return [pair for pair in pairs if pair in kept]


def longer_wins_share(differences: list[int]) -> float:
    """Share of pairs whose better side is longer, given (better - worse) lengths; ties half."""
    return statistics.fmean(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in differences)


def recipe(model_path: str, folder: Path, seed: int) -> Recipe:
    """The run: joint SFT and reward training on the pairs, then PPO with LoRA on the result."""
    return Recipe(
        name="stories",
        output_dir=str(folder),
        seed=seed,
        data=DataConfig(
            train=str(folder / "pairs.jsonl"),
            test=str(folder / "pairs_test.jsonl"),
            max_prompt_tokens=64,
            max_response_tokens=NUM_TOKENS,
        ),
        model=ModelConfig(path=model_path, device="cpu", dtype="float32"),
        lora=LoraConfig(rank=16, alpha=32.0),
        hydra_sft=HydraSFTConfig(
            num_epochs=3,
            learning_rate=1.5e-3,
            batch_size=32,
            reward_loss_coef=1.0,
            weight_decay=0.1,
            eval_every=0,
            save_every=0,
        ),
        ppo=PPOConfig(
            num_steps=30,
            rollout_batch_size=64,
            minibatch_size=32,
            num_epochs=2,
            kl_coef=0.12,
            actor_learning_rate=5e-4,
            critic_learning_rate=5e-4,
            value_head_learning_rate=5e-4,
            sampling=SAMPLING,
            eval_every=0,
            save_every=0,
        ),
        runtime=RuntimeConfig(num_threads=1),
    )


def distinct_2(texts: list[str]) -> float:
    """Different pairs of neighbouring words over all such pairs, of all texts together; 1 = nothing comes twice."""
    pairs = [pair for text in texts for pair in itertools.pairwise(re.findall(r"[a-z']+", text.lower()))]
    return len(set(pairs)) / len(pairs)


def perplexity(model: HydraModel, batch: TokenBatch) -> float:
    """Perplexity at temperature 1 of responses under the LoRA-off model, each one's last token left out."""
    mask = batch.response_mask & torch.cat(
        [batch.response_mask[:, 1:], torch.zeros(len(batch.tokens), 1).bool()], dim=1
    )
    limits = StageLimits(micro_batch_tokens=DEFAULT_MICRO_BATCH_TOKENS)
    logprobs = score_roles(model, batch, ["reference"], temperature=1.0, limits=limits).ref_logprobs
    return math.exp(-logprobs[mask].mean().item())


def describe(rollout: Rollout, reference: HydraModel, pretrained: HydraModel) -> dict[str, float]:
    """What one side's fresh samples are like."""
    values = [happy_ending(text) for text in rollout.responses]
    lengths = [len(text) for text in rollout.responses]
    return {
        "rule_mean": statistics.fmean(values),
        "rule_std": statistics.pstdev(values),
        "rule_correlation_with_characters": statistics.correlation(values, lengths),
        "score_mean": rollout.scores.mean().item(),
        "tokens_mean": rollout.batch.response_mask.sum(dim=1).double().mean().item(),
        "sentences_mean": statistics.fmean(len(complete_sentences(text)) for text in rollout.responses),
        "eos_frac": rollout.ended.double().mean().item(),
        "perplexity_reference": perplexity(reference, rollout.batch),
        "perplexity_pretrained": perplexity(pretrained, rollout.batch),
        "distinct_2": distinct_2(rollout.responses),
        "different_texts": len(set(rollout.responses)) / len(rollout.responses),
        "most_common_ending_share": most_common_ending(rollout.responses),
    }


def most_common_ending(texts: list[str]) -> float:
    """Share of texts whose last complete sentence is the most frequent one: 1 if one sentence is all there is."""
    endings = Counter((complete_sentences(text) or [""])[-1] for text in texts)
    return endings.most_common(1)[0][1] / len(texts)


def measure(run: Path, model_path: str, prompts: list[str], seed: int) -> dict[str, Any]:
    """Fresh samples of actor and reference on openings nobody has seen, by the rule and for readability."""
    finished = load_finished(run, "last")
    model, chat, config = finished.model, finished.chat, finished.run.recipe.ppo
    pretrained = HydraModel.from_pretrained(model_path, with_reward=False)
    tokenized: list[TokenizedPrompt] = chat.tokenize_prompts(Prompt(prompt) for prompt in prompts)[0]
    sides = {
        role: sample_and_score(model, chat, role, tokenized, config, stream=(seed, "fresh", role), reward_fn=None)
        for role in ("reference", "actor")
    }
    numbers: dict[str, Any] = {role: describe(rollout, model, pretrained) for role, rollout in sides.items()}
    gain = numbers["actor"]["rule_mean"] - numbers["reference"]["rule_mean"]
    actor, reference = sides["actor"], sides["reference"]
    return {
        "num_prompts": len(prompts),
        "gain_in_reference_std": gain / numbers["reference"]["rule_std"],
        "kl_nats_per_response": sequence_kl(actor).mean().item(),
        **numbers,
        "samples": [
            {
                "prompt": prompts[i],
                "before": reference.responses[i],
                "before_rule": happy_ending(reference.responses[i]),
                "after": actor.responses[i],
                "after_rule": happy_ending(actor.responses[i]),
            }
            for i in range(NUM_SHOWN)
        ],
    }


def main() -> None:
    """Sample, label, train, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the pre-trained model")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seed", type=int, default=1, help="settings were tuned with seed 0 only")
    parser.add_argument("--folder", type=Path, default=None, help="keep pairs and run folder here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="stories-"))
    folder.mkdir(parents=True, exist_ok=True)
    train, test, fresh = split_openings(args.seed, 3000, 500, 512)
    pair_numbers: dict[str, Any] = {}
    for name, prompts in (("pairs", train), ("pairs_test", test)):
        pairs, pair_numbers[name] = sample_pairs(args.model, prompts, args.seed, name)
        lines = [json.dumps(pair) for pair in pairs]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sampled = time.monotonic()
    settings = recipe(args.model, folder, args.seed)
    run = run_recipe(settings)
    trained = time.monotonic()
    summary = json.loads((run / "summary.json").read_text())
    ppo = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line["stage"] == "ppo"]
    result = {
        "pairs": pair_numbers,
        "stage1": {key: summary[key] for key in ("reward_accuracy", "longer_wins_accuracy", "perplexity")},
        "ppo_curve": {key: [round(line[key], 3) for line in ppo] for key in ("score/mean", "kl/reference")},
        "fresh": measure(run, args.model, fresh, args.seed),
        "seconds": {"pairs": sampled - started, "run": trained - sampled, "total": time.monotonic() - started},
        "seed": args.seed,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "settings": {name: asdict(getattr(settings, name)) for name in ("hydra_sft", "ppo", "lora")},
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result["fresh"].items() if key != "samples"}, indent=1))


if __name__ == "__main__":
    main()
