"""The alignment study's part `overoptimisation`: the same run with and without KL, and when a report warned."""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from shutil import copyfile
from typing import Any

from alignment_runs import Bench, curve
from alignment_systems import KL_SETTINGS, OVEROPTIMISED, SEEDS, WEAK_REWARD, merged


def overoptimisation(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """A high rate against a weak reward model, with and without KL: gold, learned score and warnings, step by step."""
    import alignment_numbers as found

    seeds = tuple(args.seeds or SEEDS)
    bench.each(partial(bench.start, "separate", seed) for seed in seeds)
    bench.each(partial(weak_reward, bench, seed) for seed in seeds)
    bench.each(partial(hacked, bench, seed, label) for seed, label in product(seeds, KL_SETTINGS))
    runs: dict[str, Any] = {}
    for label, settings in KL_SETTINGS.items():
        folders = [bench.folder(folder_name(label), seed) for seed in seeds]
        curves = [curve(folder) for folder in folders]
        runs[label] = {
            "settings": settings,
            "per_seed": [
                {"seed": seed, **found.over_optimisation(points), "warnings": first_warnings(folder, points)}
                for seed, folder, points in zip(seeds, folders, curves, strict=True)
            ],
            "curves": curves,
        }
    return {"runs": runs, "settings": merged(OVEROPTIMISED), "weak_reward": WEAK_REWARD, "seeds": list(seeds)}


def weak_reward(bench: Bench, seed: int) -> None:
    """A reward model that has seen few pairs, on the seed's SFT model."""
    start = bench.starts("separate", ("sft",), seed)
    bench.run("reward-model", "start-weak", seed, {"method": "d-lora-ppo", "reward_model": WEAK_REWARD}, start)


def hacked(bench: Bench, seed: int, label: str) -> None:
    """One run of a pair."""
    start = bench.starts("separate", ("sft",), seed)
    start["start"] |= bench.starts("weak", ("reward_model",), seed)["start"]
    bench.run("run", folder_name(label), seed, OVEROPTIMISED, KL_SETTINGS[label], start)


def folder_name(label: str) -> str:
    """A run's name, of the settings' label."""
    return label.lower().replace(" ", "-")


def first_warnings(run: Path, points: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """{warning: the first step after which a report of the run, as far as it had come, would have shown it}."""
    from hydra_rlhf.reporting.collect import read_run
    from hydra_rlhf.reporting.findings import find_problems

    first: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="alignment-study-") as temporary:
        folder = Path(temporary)
        copyfile(run / "recipe.yaml", folder / "recipe.yaml")
        for step in (int(point["step"]) for point in points):
            for name in ("metrics.jsonl", "samples.jsonl"):
                cut_lines(run / name, folder / name, step)
            for problem in find_problems(read_run(folder)):
                first.setdefault(problem.title, step)
    return first


def cut_lines(source: Path, target: Path, step: int) -> None:
    """Copy the lines of PPO up to a step."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [(line, json.loads(line)) for line in lines]
    kept = [line for line, row in rows if row["stage"] == "ppo" and row["step"] <= step]
    target.write_text("".join(kept), encoding="utf-8")
