"""Runs of `hydra-rlhf bench` in processes of its own, for `speed.py` and `peers_rounds.py`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from memory_peers import PEER_SCRIPTS, in_turns
from memory_workload import PROMPT_TOKENS, Workload, run_measured

OURS: dict[str, list[str]] = {"hydra-float32": ["--dtype", "float32"], "hydra-default": []}
"""This project's runs beside the peers: {name: options}; the peers compute in float32."""
METHODS = ("ppo", "lora-ppo", "d-lora-ppo", "j-hydra-ppo", "hydra-ppo")
LADDER_ITERATIONS = 3


def run_on_workload(python: str, work: Path, workload: Workload, system: str, *, threads: int) -> dict[str, Any]:
    """One of `OURS` on the peers' workload."""
    return run_bench(python, [*workload_options(work, workload), *OURS[system]], threads=threads)


def workload_options(work: Path, workload: Workload) -> list[str]:
    """The peers' workload in the words of `hydra-rlhf bench`; every option of it but the precision."""
    options = {
        "model": work / "model",
        "prompts": work / "pairs.jsonl",
        "method": "hydra-ppo",
        "batch": workload.batch,
        "prompt-tokens": PROMPT_TOKENS,
        "response-tokens": workload.response,
        "micro-batch": workload.micro,
        "rank": workload.rank,
        "iterations": workload.updates,
        "ppo.sampling.temperature": 0.7,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def run_bench(python: str, options: Sequence[str], *, threads: int, counts_memory: bool = False) -> dict[str, Any]:
    """`hydra-rlhf bench` of one method on the CPU: its one row, with what was seen of the process from outside."""
    command = [python, "-m", "hydra_rlhf.cli", "bench", "--device", "cpu", *options, "--json", "-"]
    measured = run_measured([*command, *([] if counts_memory else ["--time-only"])], threads=threads)
    found = json.loads(measured.output)
    (row,) = found["equal_batch"]
    if row["status"] != "measured":
        raise SystemExit(f"{' '.join(command)}: {row['status']}, so there is no time")
    return {
        "peak_rss_mib": measured.peak_rss_mib,
        "load_before": measured.load_before,
        "s_per_sample": row["time"]["s_per_sample"],
        "dtype": found["dtype"],
        "machine": found["machine"],
        "row": row,
    }


def speedups(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Medians of each system's rounds; a peer's time over ours, by medians and by our slowest and its fastest round."""
    seconds = {system: [run["s_per_sample"] for run in rounds] for system, rounds in runs.items()}
    return {
        "s_per_sample": {system: median(rounds) for system, rounds in seconds.items()},
        "speedups": [
            {
                "hydra": ours,
                "peer": peer,
                "speedup": median(seconds[peer]) / median(seconds[ours]),
                "worst_speedup": min(seconds[peer]) / max(seconds[ours]),
            }
            for ours in OURS
            for peer in PEER_SCRIPTS
            if ours in seconds and peer in seconds
        ],
    }


def measure_ladder(python: str, options: Sequence[str], *, repeats: int, threads: int) -> dict[str, Any]:
    """The five methods in turns in float32; memory is counted in the first round alone, after the timed steps."""

    def run(method: str, repeat: int) -> dict[str, Any]:
        chosen = ["--method", method, "--dtype", "float32", "--iterations", str(LADDER_ITERATIONS), *options]
        return run_bench(python, chosen, threads=threads, counts_memory=repeat == 0)

    runs = in_turns(METHODS, repeats, run)
    times = {
        method: {name: median(run["row"]["time"][name] for run in rounds) for name in rounds[0]["row"]["time"]}
        for method, rounds in runs.items()
    }
    return {
        "methods": {
            method: {
                "time": times[method],
                "planned_bytes": rounds[0]["row"]["planned_bytes"],
                "measured_bytes": rounds[0]["row"]["measured_bytes"],
                "bound_share": median(run["row"]["shares"]["bound"] for run in rounds),
            }
            for method, rounds in runs.items()
        },
        "options": list(options),
        "joined_ratio": times["j-hydra-ppo"]["s_per_sample"] / times["hydra-ppo"]["s_per_sample"],
        "runs": runs,
    }
