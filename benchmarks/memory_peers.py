"""This project's PPO and its peers' on one workload: peak resident memory and seconds per sample, taken in turns.

Every run is a process of its own. Peaks are the kernel's count over the whole life of each process, imports and loading
included, and the same for all. This project's side is its command line with a recipe.
"""

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from memory_workload import HERE, PROMPT_TOKENS, Measured, Workload, last_json, recipe, run_measured

POLICIES = ("none", "layers", "auto")
"""This project's runs, by `memory.checkpointing`."""
PEER_SCRIPTS = {
    "trl-lora": ("trl_ppo.py", "--mode", "lora"),
    "trl-best": ("trl_ppo.py", "--mode", "best"),
    "agilerl": ("agilerl_ppo.py",),
}
"""Each peer's script in `peers/` and the options that make it this run."""
BARS = {"trl-lora": 0.25, "trl-best": 0.42, "agilerl": 0.55}
"""Most of each peer's peak that hydra-ppo may need."""
VERSIONS_PROBE = """
import importlib.metadata, json, platform
found = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
print(json.dumps({"python": platform.python_version()} | found))
"""
PACKAGES = ("torch", "transformers", "peft", "trl", "agilerl", "vllm", "triton", "hydra-rlhf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pythons:
    """The interpreter of each system's environment."""

    hydra: str
    trl: str
    agilerl: str

    def of(self, system: str) -> str:
        """The interpreter that runs a system, by the first word of its name."""
        return getattr(self, system.partition("-")[0])


def described(pythons: Pythons, chosen: Sequence[str], workload: Workload, *, threads: int) -> dict[str, Any]:
    """The workload, what is installed in each environment, and what importing that much takes by itself."""
    environments = environments_of(pythons, chosen)
    return {
        "workload": asdict(workload) | {"prompt": PROMPT_TOKENS},
        "versions": {name: versions(python) for name, python in environments.items()},
        "imports_rss_mib": {name: imports_rss_mib(python, threads) for name, python in environments.items()},
    }


def in_turns(
    chosen: Sequence[str], repeats: int, run: Callable[[str, int], dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """`run(system, repeat)` of every system, `repeats` times, one after the other in each round."""
    runs: dict[str, list[dict[str, Any]]] = {system: [] for system in chosen}
    for repeat in range(repeats):
        for system in chosen:
            done = run(system, repeat)
            runs[system].append(done)
            told = f"{done['peak_rss_mib']:.0f} MiB, {done['s_per_sample']:.3f} s/sample"
            print(f"{system} {repeat + 1}/{repeats}: {told}", flush=True)
    return runs


def environments_of(pythons: Pythons, chosen: Sequence[str]) -> dict[str, str]:
    """The interpreters that some systems run in, by the first word of their names."""
    return {name: pythons.of(name) for name in dict.fromkeys(system.partition("-")[0] for system in chosen)}


def run_system(
    work: Path, workload: Workload, pythons: Pythons, system: str, repeat: int, *, threads: int, budget: str
) -> dict[str, Any]:
    """One run of one system."""
    python = pythons.of(system)
    if system.startswith("hydra-"):
        policy = system.removeprefix("hydra-")
        return run_hydra(python, work, workload, policy, name=f"{policy}-{repeat}", threads=threads, budget=budget)
    return run_peer(python, work, workload, system, threads=threads)


def run_peer(python: str, work: Path, workload: Workload, system: str, *, threads: int) -> dict[str, Any]:
    """One run of one peer's script; times are those it prints."""
    script, *options = PEER_SCRIPTS[system]
    command = [python, str(HERE / "peers" / script), str(work), *workload.peer_options(), *options]
    measured = run_measured(command, threads=threads)
    said = last_json(measured.output)
    return outside(measured) | {"s_per_sample": said["s_per_sample"], "script_says": said}


def run_hydra(
    python: str, work: Path, workload: Workload, policy: str, *, name: str, threads: int, budget: str
) -> dict[str, Any]:
    """`hydra-rlhf ppo` with the workload's recipe; times are those it logs."""
    settings = recipe(work, workload, checkpointing=policy, budget=budget, name=name)
    path = work / f"{name}.yaml"
    path.write_text(json.dumps(settings, indent=1), encoding="utf-8")  # JSON is YAML
    measured = run_measured([python, "-m", "hydra_rlhf.cli", "ppo", str(path)], threads=threads)
    folder = Path(settings["output_dir"]) / name
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return outside(measured) | read_steps(steps, workload) | {"chosen": chosen_settings(folder)}


def outside(measured: Measured) -> dict[str, Any]:
    """What was seen of a process from outside."""
    return {"peak_rss_mib": measured.peak_rss_mib, "load_before": measured.load_before}


def read_steps(steps: Sequence[dict[str, Any]], workload: Workload) -> dict[str, Any]:
    """Seconds per sample of a run's logged steps: the median, the first step dropped, as the peers' scripts do."""
    lengths = {step["response/tokens_mean"] for step in steps}
    if lengths != {float(workload.response)}:
        raise SystemExit(f"responses have {sorted(lengths)} tokens on average, not {workload.response} each")
    timed = steps[1:] or steps
    phases = {"s_per_sample": "step", "rollout_s": "rollout", "score_s": "score", "update_s": "update"}
    seconds = {
        name: median(step[f"time/{phase}_s"] for step in timed) / workload.batch for name, phase in phases.items()
    }
    last = {key: value for key, value in steps[-1].items() if key.startswith("memory/")}
    return seconds | {"memory_metrics": last}


def chosen_settings(folder: Path) -> dict[str, Any]:
    """What the run's memory plan decided for PPO, and the peak of tensors that it expected."""
    decided = json.loads((folder / "memory_plan.json").read_text(encoding="utf-8"))["ppo"]
    return {name: value for name, value in decided.items() if name not in ("phases", "options")}


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Median peak and time of each system over its runs, and this project's shares of the peers' peaks."""
    of_system = {
        system: {
            "peak_rss_mib": median(run["peak_rss_mib"] for run in rounds),
            "s_per_sample": median(run["s_per_sample"] for run in rounds),
        }
        for system, rounds in runs.items()
    }
    ratios = [
        {
            "hydra": ours,
            "peer": peer,
            "peak_ratio": of_system[ours]["peak_rss_mib"] / of_system[peer]["peak_rss_mib"],
            "worst_peak_ratio": highest(runs[ours]) / lowest(runs[peer]),
            "time_ratio": of_system[ours]["s_per_sample"] / of_system[peer]["s_per_sample"],
            "bar": bar,
        }
        for ours in of_system
        if ours.startswith("hydra-")
        for peer, bar in BARS.items()
        if peer in of_system
    ]
    return {"medians": of_system, "ratios": ratios}


def highest(runs: Sequence[dict[str, Any]]) -> float:
    """The largest peak of several runs."""
    return max(run["peak_rss_mib"] for run in runs)


def lowest(runs: Sequence[dict[str, Any]]) -> float:
    """The smallest peak of several runs."""
    return min(run["peak_rss_mib"] for run in runs)


def versions(python: str) -> dict[str, str]:
    """The Python of an environment and what it has of the packages that matter."""
    done = subprocess.run([python, "-c", VERSIONS_PROBE], capture_output=True, text=True, check=True)
    found = last_json(done.stdout)
    return {name: found[name] for name in ("python", *PACKAGES) if name in found}


def imports_rss_mib(python: str, threads: int) -> float:
    """What torch and transformers alone take in an environment: the part of every peak that no trainer decides."""
    return run_measured([python, "-c", "import torch, transformers.modeling_utils"], threads=threads).peak_rss_mib
