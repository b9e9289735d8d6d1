"""The peers' rounds of the memory and the speed benchmark, taken once for both: half the time of two sets of rounds.

    python benchmarks/peers_rounds.py --hydra-python .venv-bench/bin/python

In every round, one after the other: `hydra-rlhf ppo` for its memory, `hydra-rlhf bench` for its time in float32 and in
the default precision, and each peer. Renews the part `peers` of results/memory.json and of results/speed.json.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from memory_peers import PEER_SCRIPTS, POLICIES, Pythons, described, in_turns, run_system, summarise
from memory_workload import HERE, Workload, make_workload
from parts import circumstances, write_part
from speed_runs import OURS, run_on_workload, speedups

RESULTS = HERE / "results"


def one_round(args: argparse.Namespace, work: Path, workload: Workload, number: int) -> dict[str, dict[str, Any]]:
    """One run of every system, one after the other."""
    pythons = pythons_of(args)

    def run(system: str, _: int) -> dict[str, Any]:
        if system in OURS:
            return run_on_workload(pythons.hydra, work, workload, system, threads=args.threads)
        return run_system(work, workload, pythons, system, number, threads=args.threads, budget="auto")

    systems = [*(f"hydra-{policy}" for policy in args.policies), *OURS, *PEER_SCRIPTS]
    return {system: run for system, (run,) in in_turns(systems, 1, run).items()}


def pythons_of(args: argparse.Namespace) -> Pythons:
    """The interpreters of the three environments."""
    return Pythons(hydra=args.hydra_python, trl=args.trl_python, agilerl=args.agilerl_python)


def write(folder: Path, about: dict[str, Any], rounds: list[dict[str, dict[str, Any]]]) -> None:
    """Both parts, from the rounds so far."""
    runs = {system: [found[system] for found in rounds] for system in rounds[0]}
    of_memory = {system: found for system, found in runs.items() if system not in OURS}
    of_speed = {system: found for system, found in runs.items() if system in (*OURS, *PEER_SCRIPTS)}
    write_part(folder / "memory.json", "peers", about | summarise(of_memory) | {"runs": of_memory})
    write_part(folder / "speed.json", "peers", about | speedups(of_speed) | {"runs": of_speed})


def main() -> None:
    """Measure, and write both parts after each round, so that what there is of them is kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=["30m", "60m", "135m"], default="135m")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=["auto"], help="memory.checkpointing")
    parser.add_argument("--updates", type=int, default=4, help="of each run; the first is not timed")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of every process")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of both files")
    parser.add_argument("--hydra-python", default=sys.executable)
    parser.add_argument("--trl-python", default=".venv-trl/bin/python")
    parser.add_argument("--agilerl-python", default=".venv-agilerl/bin/python")
    args = parser.parse_args()
    workload = Workload(shape=args.shape, batch=16, response=64, micro=4, rank=16, updates=args.updates)
    about = {"measured": circumstances(args.threads)}
    rounds: list[dict[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        make_workload(Path(folder), workload.shape)
        for number in range(args.repeats):
            rounds.append(one_round(args, Path(folder), workload, number))
            if number == 0:
                about |= described(pythons_of(args), list(rounds[0]), workload, threads=args.threads)
            write(args.results, about, rounds)


if __name__ == "__main__":
    main()
