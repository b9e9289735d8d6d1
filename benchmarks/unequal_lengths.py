"""Time of scoring and updating where responses end at very unequal lengths, against the share of padding.

    python benchmarks/unequal_lengths.py [--quick]

The model is random, so every token is about equally likely; the more ids count as stop tokens, the shorter responses
get, and their lengths are geometric. The rollout's block is as wide as its longest response; what is no token of it is
padding. Prints one JSON line.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench_recipe import bench_recipe, llama_folder, only_the_last_line

from hydra_rlhf.benchmark.bench import Bench, decide
from hydra_rlhf.benchmark.measure import machine_settings, measure_method

VOCAB = 8192
PROMPT_TOKENS = 16


class Lengths:
    """A reward function that gives nothing and keeps how long the responses of each PPO step were."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], response_ids: Sequence[Sequence[int]]
    ) -> list[float]:
        """Zero for every response."""
        del prompts, responses
        self.steps.append([len(ids) for ids in response_ids])
        return [0.0] * len(response_ids)


def padding_share(prompt: int, lengths: Sequence[int]) -> float:
    """Of a block as wide as its longest response, the share that is no token; all prompts are `prompt` tokens long."""
    return 1.0 - (len(lengths) * prompt + sum(lengths)) / (len(lengths) * (prompt + max(lengths)))


def measure(path: str, *, batch: int, response: int, mean_length: int | None, iterations: int) -> dict[str, Any]:
    """One row: responses of `response` tokens each, or of `mean_length` on average and at most `response`."""
    stops = {} if mean_length is None else {"min_response": 1, "stop_token_ids": tuple(range(VOCAB // mean_length))}
    recipe = bench_recipe(
        path, batch=batch, prompt=PROMPT_TOKENS, response=response, iterations=iterations, micro=8, **stops
    )
    bench = Bench(recipe, watch=False, max_batch=batch)
    lengths = Lengths()
    with machine_settings(recipe.runtime):
        cuts = decide(bench, recipe, bench.budget).chosen.cuts
        measured = measure_method(recipe, cuts, watch=False, reward_fn=lengths)
    timed = list(zip(measured.steps, lengths.steps, strict=True))[1:]
    return {
        "mean_length": sum(map(sum, lengths.steps)) / sum(map(len, lengths.steps)),
        "padding_share": median(padding_share(PROMPT_TOKENS, step) for _, step in timed),
        "learn_s_per_token": median(
            (seconds["score_s"] + seconds["update_s"]) / (len(step) * PROMPT_TOKENS + sum(step))
            for seconds, step in timed
        ),
        **{
            f"{phase}_per_sample": median(seconds[phase] for seconds, _ in timed) / batch
            for phase in ("generate_s", "score_s", "update_s")
        },
    }


def main() -> None:
    """Full responses, then shorter and shorter ones; times per token are held against those of full responses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rows")
    args = parser.parse_args()
    means: list[int | None] = [None, 4] if args.quick else [None, 64, 32, 16]
    hidden, layers, batch, response = (64, 2, 4, 8) if args.quick else (512, 8, 256, 128)
    full_batch = max(2, batch // 8)  # full rows are all alike: fewer say the same
    with tempfile.TemporaryDirectory(prefix="unequal-") as folder, only_the_last_line():
        path = llama_folder(Path(folder) / "model", hidden=hidden, layers=layers, vocab=VOCAB)
        iterations = 2 if args.quick else 3
        rows = [
            measure(
                path,
                batch=batch if mean else full_batch,
                response=response,
                mean_length=mean,
                iterations=iterations,
            )
            for mean in means
        ]
    full = rows[0]["learn_s_per_token"]
    rows = [row | {"per_token_ratio": row["learn_s_per_token"] / full} for row in rows]
    settings = {
        "hidden": hidden,
        "layers": layers,
        "vocab": VOCAB,
        "batch": batch,
        "response": response,
        "full_batch": full_batch,
    }
    print(json.dumps({"settings": settings | {"prompt": PROMPT_TOKENS}, "rows": rows}))


if __name__ == "__main__":
    main()
