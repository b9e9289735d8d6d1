"""The alignment study's part `tuning`: learning rates on the development seeds, of which nothing else is reported."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from alignment_runs import Bench
from alignment_systems import DEVELOPMENT_SEEDS, SYSTEMS, TRL, TRL_GRID, TUNING_STEPS, Player, merged


def tuning(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """Mean held-out gold of every grid point on the development seeds, by each run's own evaluation."""
    bench = replace(bench, base=merged({"ppo": {"num_steps": TUNING_STEPS}}, bench.base))
    seeds = tuple(args.seeds or DEVELOPMENT_SEEDS)
    names = tuple(name for name in args.systems if name in SYSTEMS)
    points = [(name, number) for name in names for number in range(len(SYSTEMS[name].grid))]
    bench.each(partial(bench.start, kind, s) for s, kind in product(seeds, {SYSTEMS[n].start for n in names}))
    bench.each(
        partial(bench.system, SYSTEMS[name], seed, SYSTEMS[name].grid[number], label=f"{name}-grid{number}")
        for seed, (name, number) in product(seeds, points)
    )
    rows = [
        {"system": name, "settings": SYSTEMS[name].grid[number], **tuned(bench, f"{name}-grid{number}", seeds)}
        for name, number in points
    ]
    if TRL in args.systems:
        bench.each(partial(bench.system, SYSTEMS["hydra-ppo"], seed) for seed in seeds)
        bench.each(partial(bench.trl_inputs, seed) for seed in seeds)
        grid = {f"{TRL}-grid{number}": settings for number, settings in enumerate(TRL_GRID)}
        bench.each(
            partial(bench.trl, seed, settings, label) for seed, (label, settings) in product(seeds, grid.items())
        )
        everybody = [Player(name=label, run="hydra-ppo", adapter=True) for label in grid]
        bench.answer(everybody, seeds, num_prompts=args.num_prompts)
        for label, settings in grid.items():
            seen = [bench.answers(label, seed) for seed in seeds]
            golds = [sum(one["gold"]) / len(one["gold"]) for one in seen]
            kl = [one["kl"] for one in seen]
            rows.append({"system": TRL, "settings": settings, "gold_mean": golds, "kl": kl})
    return {"seeds": list(seeds), "num_steps": TUNING_STEPS, "rows": rows}


def tuned(bench: Bench, label: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Gold and KL of one grid point, a number for each seed."""
    summaries = [bench.summary(label, seed) for seed in seeds]
    return {"gold_mean": [one["gold_mean"] for one in summaries], "kl": [one["kl"] for one in summaries]}
