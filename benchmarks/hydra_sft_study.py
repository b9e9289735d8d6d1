"""What joining costs: Hydra-SFT against a separate SFT and reward model, equal epochs on the same pairs.

    python benchmarks/hydra_sft_study.py --out benchmarks/results/hydra_sft_study.json --work WORK

At least 10,000 training pairs of the built-in world, three seeds. Both sides read the same held-out pairs, so their
differences are paired; intervals are over seeds and pairs (docs/decisions/0020). WORK keeps finished
runs, so an interrupted study goes on with the same command.
"""

import argparse
import json
import math
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from alignment_runs import THREADS, Bench, read_json, training_cost
from alignment_systems import BASE, SEEDS, STARTS, Settings, merged
from memory_workload import HERE, last_json, run_measured
from parts import circumstances, write_part

WORLD_PAIRS = 12_000
"""Of which a tenth is held out: 10,800 to train on, 1,200 to compare on."""
MAX_PERPLEXITY_RATIO = 1.01
MAX_ACCURACY_LOSS = 0.01
QUICK: Settings = {
    "data": {"world_pairs": 200},
    **{stage: {"num_epochs": 0.5} for stage in ("sft", "reward_model", "hydra_sft")},
}
KINDS = tuple(STARTS)


def study(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """Train both sides on every seed, let them read the held-out pairs, compare."""
    pairs: Settings = {"data": {"world_pairs": args.pairs}}
    bench.each(partial(bench.start, kind, seed, pairs) for seed, kind in product(args.seeds, KINDS))
    bench.each(partial(read_held_out, bench, seed) for seed in args.seeds)
    rows = [read_json(bench.work / "read" / f"s{seed}.json") for seed in args.seeds]
    costs = {kind: [training_cost(bench.folder(f"start-{kind}", seed)) for seed in args.seeds] for kind in KINDS}
    settings = merged(BASE, pairs, bench.base)
    shown = {name: settings[name] for name in ("data", "model", "sft", "reward_model", "hydra_sft")}
    return {"seeds": list(args.seeds), "settings": shown, "costs": costs, **compare(rows)}


def read_held_out(bench: Bench, seed: int) -> None:
    """What both sides of a seed say about the held-out pairs, by a process of its own."""
    out = bench.work / "read" / f"s{seed}.json"
    if out.exists():
        return
    folders = [str(bench.folder(f"start-{kind}", seed)) for kind in KINDS]
    done = run_measured([sys.executable, str(HERE / "hydra_sft_read.py"), *folders], threads=THREADS)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(last_json(done.output)) + "\n", encoding="utf-8")


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Perplexity as a ratio and reward accuracy as a difference, Hydra-SFT to the separate models, with intervals.

    A row is a seed: {kind: {"logprobs": [n], "num_tokens": [n], "margins": [n]}} over its held-out pairs.
    """
    import numpy as np
    from alignment_numbers import average, over_seeds

    def column(kind: str, name: str) -> Any:
        return np.array([row[kind][name] for row in rows], dtype=float)

    tokens = column("hydra", "num_tokens")
    # Log of the ratio of perplexities: log-probability lost per token. A ratio of sums, so its interval is that of the
    # mean of what each pair adds to it.
    lost = column("separate", "logprobs") - column("hydra", "logprobs")
    log_ratio = float(lost.sum() / tokens.sum())
    added = average(log_ratio + (lost - log_ratio * tokens) / tokens.mean())
    ratio = math.exp(log_ratio)
    right = {kind: 0.5 * (1 + np.sign(column(kind, "margins"))) for kind in KINDS}
    gained = average(right["hydra"] - right["separate"])
    perplexity = {kind: over_seeds(np.exp(-column(kind, "logprobs").sum(1) / tokens.sum(1)).tolist()) for kind in KINDS}
    return {
        "perplexity": perplexity,
        "perplexity_ratio": {"mean": ratio, "ci": [math.exp(end) for end in added["ci"]]},
        "reward_accuracy": {kind: average(right[kind]) for kind in KINDS},
        "reward_accuracy_difference": gained,
        "num_pairs": int(tokens.shape[1]),
        "bars": [
            {
                "what": "perplexity, Hydra-SFT to separate SFT",
                "bar": f"<= {MAX_PERPLEXITY_RATIO}",
                "found": ratio,
                "holds": ratio <= MAX_PERPLEXITY_RATIO,
            },
            {
                "what": "reward accuracy, Hydra-SFT minus separate reward model",
                "bar": f">= -{MAX_ACCURACY_LOSS}",
                "found": gained["mean"],
                "holds": gained["mean"] >= -MAX_ACCURACY_LOSS,
            },
        ],
    }


def main() -> None:
    """Run the study and write its file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--work", type=Path, required=True, help="folder of all runs; finished ones are not run again")
    parser.add_argument("--part", choices=["stage1"], default="stage1", help="there is one")
    parser.add_argument("--pairs", type=int, default=WORLD_PAIRS, help="preference pairs, a tenth of them held out")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--parallel", type=int, default=2, help="processes side by side, one thread each")
    parser.add_argument("--quick", action="store_true", help="little data: shows that it runs, measures nothing")
    args = parser.parse_args()
    base = QUICK if args.quick else {}
    bench = Bench(work=args.work.resolve(), parallel=args.parallel, trl_python="", base=base)
    measured = circumstances(THREADS) | {"parallel": args.parallel, "quick": args.quick}
    write_part(args.out, args.part, {"measured": measured, **study(args, bench)})


if __name__ == "__main__":
    main()
