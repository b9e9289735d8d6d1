"""Does it align as well as the others? SFT, five PPO methods, RLOO, GRPO, DPO, best-of-n and TRL's PPO by a gold score.

    python benchmarks/alignment_study.py --out benchmarks/results/alignment_study.json --work WORK

All systems see equally many samples of the built-in world, from stage-1 models that the systems of a seed share, and
answer the same held-out prompts with the same uniform numbers. WORK keeps every finished run, so an interrupted study
goes on with the same command. Parts: `study` (everybody), `overoptimisation` (a run without KL beside the same one with
it), `tuning` (learning rates on the development seeds; not part of a full study).
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from alignment_overoptimisation import overoptimisation
from alignment_runs import THREADS, Bench, curve, read_json, training_cost
from alignment_systems import (
    BASE,
    BEST_OF,
    DEVELOPMENT_SEEDS,
    NUM_PROMPTS,
    PROMPT_SEED,
    SEEDS,
    STARTS,
    SYSTEMS,
    TRL,
    TRL_SETTINGS,
    Player,
    Settings,
    merged,
    players,
)
from alignment_tuning import tuning
from parts import circumstances, write_part

PAPER = ("sft", "lora-ppo", "hydra-sft", "j-hydra-ppo", "hydra-ppo")
"""The rows of the paper's Table 3."""
CRITIC_FREE = ("rloo", "grpo")
QUICK: Settings = {
    "data": {"world_pairs": 300},
    "sft": {"num_epochs": 0.5},
    "reward_model": {"num_epochs": 0.5},
    "hydra_sft": {"num_epochs": 0.5},
    "ppo": {"num_steps": 2, "eval_every": 1, "num_eval_prompts": 8},
    "evaluation": {"num_prompts": 8},
}
"""Laid over everything by `--quick`: shows that the study runs, measures nothing."""


def study(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """Every system on every seed, and all numbers."""
    seeds, names = tuple(args.seeds or SEEDS), tuple(args.systems)
    trained = tuple(name for name in names if name in SYSTEMS)
    if TRL in names and "hydra-ppo" not in names:
        raise SystemExit(f"{TRL} starts from what hydra-ppo starts from; name both")
    train(bench, trained, seeds, with_trl=TRL in names)
    everybody = players(trained, with_trl=TRL in names)
    bench.answer(everybody, seeds, num_prompts=args.num_prompts)
    return numbers(bench, everybody, seeds)


def train(bench: Bench, names: Sequence[str], seeds: Sequence[int], *, with_trl: bool) -> None:
    """The shared starts, then all systems, then TRL, which needs what hydra-ppo started from."""
    kinds = dict.fromkeys(SYSTEMS[name].start for name in names)
    bench.each(partial(bench.start, kind, seed) for seed, kind in product(seeds, kinds))
    bench.each(partial(bench.system, SYSTEMS[name], seed) for seed, name in product(seeds, names))
    if with_trl:
        bench.each(partial(bench.trl, seed) for seed in seeds)


def numbers(bench: Bench, everybody: Sequence[Player], seeds: Sequence[int]) -> dict[str, Any]:
    """The content of the result, from what the runs left."""
    import alignment_numbers as found

    answers = {player.name: [bench.answers(player.name, seed) for seed in seeds] for player in everybody}
    golds = found.gold_of(answers)
    costs = {
        player.name: [cost_of(bench, player, seed) for seed in seeds] for player in everybody if not player.best_of
    }
    starts = {player.name: player.start for player in everybody}
    methods = found.describe_methods(answers, costs, starts, seeds)
    curves = {name: [curve(bench.folder(name, seed)) for seed in seeds] for name in methods if name in SYSTEMS}
    for name, by_seed in curves.items():
        summaries = [bench.summary(name, seed) for seed in seeds]
        methods[name] |= {
            "settings": merged(SYSTEMS[name].settings),
            "num_samples": num_samples(bench, name),
            "independent_gold_win_rate": found.over_seeds([one["gold_win_rate"] for one in summaries]),
            "curves": by_seed,
        }
    if TRL in methods:
        peer = read_json(bench.folder(TRL, seeds[0]) / "measured.json")
        methods[TRL] |= {name: peer[name] for name in ("settings", "num_samples")}
    equal = {
        f"hydra-ppo/{name}": found.equal_seconds(curves["hydra-ppo"], curves[name])
        for name in CRITIC_FREE
        if name in curves and "hydra-ppo" in curves
    }
    content = {
        "methods": methods,
        "head_to_head": found.head_to_head(golds),
        "round_robin": found.round_robin(golds),
        "table_3": found.round_robin({name: golds[name] for name in PAPER})
        if all(name in golds for name in PAPER)
        else None,
        "equal_seconds": equal,
        "reward_accuracy": {kind: reward_accuracy(bench, kind, seeds) for kind in STARTS},
    }
    return content | {"bars": bars(content)}


def num_samples(bench: Bench, name: str) -> int | None:
    """Responses that a system samples in training; None for one that learns from the pairs as they are."""
    if "preference" in SYSTEMS[name].settings:
        return None
    ppo = merged(BASE, SYSTEMS[name].settings, bench.base)["ppo"]
    return ppo["num_steps"] * ppo["rollout_batch_size"] * ppo.get("samples_per_prompt", 1)


def bars(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the study has to show, with the number found and whether it does."""
    methods, pairs = content["methods"], content["head_to_head"]
    rows: list[tuple[str, str, float, bool]] = []
    if "hydra-ppo" not in methods:
        return []
    ours = methods["hydra-ppo"]
    won = ours["gold_win_rate_vs_start"]
    rows.append(("hydra-ppo against its start, gold win rate", ">= 0.85", won, won >= 0.85))
    rows.append(("hydra-ppo, KL from its start, nats", "<= 10", ours["kl"], ours["kl"] <= 10))
    for other in ("lora-ppo", TRL):
        if other in methods:
            won = pairs[f"hydra-ppo/{other}"]["mean"]
            rows.append((f"hydra-ppo against {other}, gold win rate", ">= 0.47", won, won >= 0.47))
    if TRL in methods:
        ratio = ours["seconds"] / methods[TRL]["seconds"]
        rows.append((f"seconds of hydra-ppo to those of {TRL}", "<= 1", ratio, ratio <= 1))
    return [dict(zip(("what", "bar", "found", "holds"), row, strict=True)) for row in rows]


def cost_of(bench: Bench, player: Player, seed: int) -> dict[str, Any]:
    """Seconds of training and peak memory of a player: of a start its stage 1, else what came after the start."""
    if player.role == "reference":
        kind, stage = ("hydra", "hydra_sft") if player.name == "hydra-sft" else ("separate", "sft")
        return training_cost(bench.folder(f"start-{kind}", seed), stage)
    if player.adapter:
        return read_json(bench.folder(player.name, seed) / "measured.json")
    return training_cost(bench.folder(player.run, seed))


def reward_accuracy(bench: Bench, kind: str, seeds: Sequence[int]) -> list[float | None]:
    """Accuracy of a start's reward model on noisy held-out pairs, as the runs that use it measured it."""
    run = next(
        (name for name, system in SYSTEMS.items() if system.start == kind and has_summary(bench, name, seeds)), None
    )
    if run is None:
        return []
    return [bench.summary(run, seed).get("reward_accuracy") for seed in seeds]


def has_summary(bench: Bench, name: str, seeds: Sequence[int]) -> bool:
    """Whether a system has finished on all seeds."""
    return all((bench.folder(name, seed) / "summary.json").exists() for seed in seeds)


PARTS: dict[str, Callable[[argparse.Namespace, Bench], dict[str, Any]]] = {
    "study": study,
    "overoptimisation": overoptimisation,
    "tuning": tuning,
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, or to renew parts of")
    parser.add_argument("--work", type=Path, required=True, help="folder of all runs; finished ones are not run again")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part (default: all but tuning)")
    parser.add_argument("--systems", choices=[*SYSTEMS, TRL], nargs="+", default=[*SYSTEMS, TRL])
    parser.add_argument("--seeds", type=int, nargs="+", help=f"default: {SEEDS}, of `tuning` {DEVELOPMENT_SEEDS}")
    parser.add_argument("--num-prompts", type=int, default=NUM_PROMPTS, help="held-out prompts that everybody answers")
    parser.add_argument("--parallel", type=int, default=2, help="processes side by side, one thread each")
    parser.add_argument("--trl-python", default=".venv-trl/bin/python", help="from `make bench-peers`")
    parser.add_argument("--quick", action="store_true", help="a few small steps: shows that it runs, measures nothing")
    return parser.parse_args()


def main() -> None:
    """Run the chosen parts; each is written as soon as it is there."""
    args = parse_arguments()
    work = args.work.resolve()
    base = QUICK if args.quick else {}
    bench = Bench(work=work, parallel=args.parallel, trl_python=args.trl_python, base=base)
    for name in args.part or ("study", "overoptimisation"):
        measured = circumstances(THREADS) | {"parallel": args.parallel, "quick": args.quick}
        content = {"measured": measured, **PARTS[name](args, bench)}
        if name != "study":
            write_part(args.out, name, content)
            continue
        facts = {"num_prompts": args.num_prompts, "prompt_seed": PROMPT_SEED, "best_of": BEST_OF}
        content["settings"] = {"base": merged(BASE, base), TRL: dict(TRL_SETTINGS), **facts}
        for key in ("methods", "head_to_head"):  # at the top of the file, for whoever reads only these
            write_part(args.out, key, content.pop(key))
        write_part(args.out, name, content)
    from alignment_picture import save_picture

    save_picture(read_json(args.out), args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
