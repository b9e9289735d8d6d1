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


def measure(args: argparse.Namespace, work: Path, workload: Workload) -> dict[str, list[dict[str, Any]]]:
    """Every run of every round, by system."""
    pythons = Pythons(hydra=args.hydra_python, trl=args.trl_python, agilerl=args.agilerl_python)
    ours = [f"hydra-{policy}" for policy in args.policies]

    def run(system: str, repeat: int) -> dict[str, Any]:
        if system in OURS:
            return run_on_workload(pythons.hydra, work, workload, system, threads=args.threads)
        return run_system(work, workload, pythons, system, repeat, threads=args.threads, budget="auto")

    return in_turns([*ours, *OURS, *PEER_SCRIPTS], args.repeats, run)


def main() -> None:
    """Measure, and write both parts."""
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
    before = {"measured": circumstances(args.threads)}
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        make_workload(Path(folder), workload.shape)
        runs = measure(args, Path(folder), workload)
    pythons = Pythons(hydra=args.hydra_python, trl=args.trl_python, agilerl=args.agilerl_python)
    about = before | described(pythons, list(runs), workload, threads=args.threads)
    of_memory = {system: rounds for system, rounds in runs.items() if system not in OURS}
    of_speed = {system: rounds for system, rounds in runs.items() if system in (*OURS, *PEER_SCRIPTS)}
    write_part(args.results / "memory.json", "peers", about | summarise(of_memory) | {"runs": of_memory})
    write_part(args.results / "speed.json", "peers", about | speedups(of_speed) | {"runs": of_speed})


if __name__ == "__main__":
    main()
