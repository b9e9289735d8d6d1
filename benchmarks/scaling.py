"""How time per sample and memory of hydra-ppo grow with the batch, the response, the vocabulary and the model.

    python benchmarks/scaling.py [--quick]

Small random Llamas in float32 on the CPU; one of the four is varied at a time. Prints one JSON line.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_recipe import bench_recipe, llama_folder, only_the_last_line

from hydra_rlhf.benchmark.bench import Bench, equal_batch
from hydra_rlhf.benchmark.measure import machine_settings

BASE = {"batch": 8, "response": 32, "vocab": 16384, "model": "256 x 8"}
"""The point that all four curves go through; a model is its width by its layers."""
CURVES: dict[str, list[Any]] = {
    "batch": [2, 4, 8, 16, 32],
    "response": [16, 32, 64, 128],
    "vocab": [4096, 16384, 65536],
    "model": ["128 x 4", "256 x 8", "384 x 12", "512 x 16"],
}
QUICK: dict[str, list[Any]] = {
    "batch": [2, 4],
    "response": [4, 8],
    "vocab": [512, 1024],
    "model": ["64 x 2", "128 x 2"],
}
QUICK_BASE = {"batch": 2, "response": 4, "vocab": 512, "model": "64 x 2"}
PROMPT_TOKENS = 32
KEPT = (
    "time",
    "planned_bytes",
    "measured_bytes",
    "micro_batch_tokens",
    "checkpointed_layers",
    "tokens_per_s",
    "shares",
)
"""What is kept of each point's row."""


def points(base: dict[str, Any], curves: dict[str, list[Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(curve, point) of every point: the base with one of its values changed."""
    for name, values in curves.items():
        for value in values:
            yield name, base | {name: value}


def measure(work: Path, point: dict[str, Any], iterations: int) -> dict[str, Any]:
    """The row of one point."""
    hidden, layers = (int(number) for number in point["model"].split(" x "))
    path = llama_folder(
        work / f"{hidden}-{layers}-{point['vocab']}", hidden=hidden, layers=layers, vocab=point["vocab"]
    )
    recipe = bench_recipe(
        path, batch=point["batch"], prompt=PROMPT_TOKENS, response=point["response"], iterations=iterations, micro=8
    )
    with machine_settings(recipe.runtime):
        (row,) = equal_batch(Bench(recipe, watch=True, max_batch=1), ["hydra-ppo"])
    return {name: row[name] for name in KEPT}


def main() -> None:
    """Every point once; points that several curves share are measured once."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two tiny points a curve")
    args = parser.parse_args()
    base, curves = (QUICK_BASE, QUICK) if args.quick else (BASE, CURVES)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in curves}
    known: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder, only_the_last_line():
        for name, point in points(base, curves):
            key = json.dumps(point)
            if key not in known:
                known[key] = measure(Path(folder), point, iterations=2 if args.quick else 3)
            found[name].append({"value": point[name], **known[key]})
    print(json.dumps({"base": base | {"prompt": PROMPT_TOKENS}, "curves": found}))


if __name__ == "__main__":
    main()
