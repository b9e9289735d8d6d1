"""Runs the alignment study's processes, a few side by side, and takes up an interrupted study where it stopped.

Every run is the command line with a recipe, in a process of its own, in a folder of its own below the work folder. A
finished run is not run again, an interrupted one resumes. Imports nothing heavy: see `memory_workload.py`.
"""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from alignment_systems import BASE, STARTS, TRL, TRL_SETTINGS, Player, Settings, System, merged
from memory_workload import HERE, last_json, run_measured

THREADS = 1
"""Of every process: two side by side do more on two cores than one with two threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where a study works and how much of the machine it takes."""

    work: Path
    parallel: int
    trl_python: str
    base: Settings
    """Laid over the settings of every run, e.g. few steps to see that the study runs."""

    def each(self, jobs: Iterable[Callable[[], object]]) -> None:
        """All jobs, `parallel` at a time; after the first one that fails no other begins, and its error is raised."""
        failures: list[BaseException] = []

        def attempt(job: Callable[[], object]) -> None:
            if failures:
                return
            try:
                job()
            except BaseException as error:  # a failed process raises SystemExit
                failures.append(error)

        with ThreadPoolExecutor(self.parallel) as pool:
            list(pool.map(attempt, jobs))
        if failures:
            raise failures[0]

    def folder(self, name: str, seed: int) -> Path:
        """The run folder of a system, or of a start."""
        return self.work / "runs" / f"{name}-s{seed}"

    def run(self, command: str, name: str, seed: int, *settings: Settings) -> None:
        """One of the command line's stages with these settings, unless it is done."""
        recipe = merged(
            BASE, *settings, self.base, {"name": f"{name}-s{seed}", "output_dir": str(self.work / "runs"), "seed": seed}
        )
        path = self.work / "recipes" / f"{name}-s{seed}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")  # JSON is YAML
        last_stage = {"run": "evaluation", "hydra-sft": "hydra_sft", "reward-model": "reward_model"}[command]
        if is_done(self.folder(name, seed), last_stage):
            return
        line = [sys.executable, "-m", "hydra_rlhf.cli", command, str(path), "--resume"]
        run_measured(line, threads=THREADS)
        print(f"{name}, seed {seed}: done", flush=True)

    def start(self, kind: str, seed: int, *settings: Settings) -> None:
        """The stage-1 models that all systems of a seed start from."""
        command, method, _ = STARTS[kind]
        self.run(command, f"start-{kind}", seed, {"method": method}, *settings)

    def starts(self, kind: str, takes: Iterable[str], seed: int) -> dict[str, Any]:
        """Settings that begin from these stage-1 models."""
        return {"start": {stage: str(self.folder(f"start-{kind}", seed) / stage) for stage in takes}}

    def system(self, system: System, seed: int, *settings: Settings, label: str | None = None) -> None:
        """A system's run from the shared start."""
        start = self.starts(system.start, system.takes, seed)
        self.run("run", label or system.name, seed, system.settings, start, *settings)

    def trl_inputs(self, seed: int) -> Path:
        """Weights, reward model and prompts of the seed's hydra-ppo run, as TRL reads them."""
        inputs = self.work / "trl" / f"inputs-s{seed}"
        if not (inputs / "workload.json").exists():
            script = str(HERE / "alignment_peer.py")
            run_measured([sys.executable, script, str(self.folder("hydra-ppo", seed)), str(inputs)], threads=THREADS)
        return inputs

    def trl(self, seed: int, settings: Settings = TRL_SETTINGS, label: str = TRL) -> None:
        """TRL's PPO on the inputs of a seed, which two runs side by side must not make at once."""
        folder = self.folder(label, seed)
        if (folder / "measured.json").exists():
            return
        inputs = self.trl_inputs(seed)
        options = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        script = str(HERE / "peers" / "trl_study.py")
        done = run_measured(
            [self.trl_python, script, str(inputs), str(folder), "--seed", str(seed), *options], threads=THREADS
        )
        content = last_json(done.output) | {"peak_bytes": round(done.peak_rss_mib * 2**20), "settings": dict(settings)}
        (folder / "measured.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"{label}, seed {seed}: done", flush=True)

    def answer(self, everybody: Sequence[Player], seeds: Sequence[int], *, num_prompts: int) -> None:
        """Let all players answer, a process for each seed."""
        script, listed = str(HERE / "alignment_answers.py"), json.dumps([asdict(player) for player in everybody])
        line = [sys.executable, script, str(self.work), "--num-prompts", str(num_prompts), "--players", listed]
        self.each(partial(run_measured, [*line, "--seed", str(seed)], threads=THREADS) for seed in seeds)

    def answers(self, name: str, seed: int) -> dict[str, Any]:
        """What a player answered."""
        return read_json(self.work / "answers" / f"{name}-s{seed}.json")

    def summary(self, name: str, seed: int) -> dict[str, Any]:
        """The few numbers of a system's run."""
        return read_json(self.folder(name, seed) / "summary.json")


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def is_done(run: Path, stage: str) -> bool:
    """Whether a run folder has finished a stage."""
    stages = run / "stages.json"
    return stages.exists() and bool(read_json(stages).get(stage, {}).get("done"))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def training_cost(run: Path, *stages: str) -> dict[str, Any]:
    """Seconds of a run's optimizer steps (rollouts included, looks at held-out prompts not), of these stages where some
    are named, and the whole process's peak memory."""
    costs = read_json(run / "costs.json")
    steps = [line for line in read_metrics(run) if "time/step_s" in line and (not stages or line["stage"] in stages)]
    return {
        "seconds": sum(line["time/step_s"] for line in steps),
        "peak_bytes": costs["peak_rss_bytes"],
        "wall_s": costs["wall_s"],
    }


def curve(run: Path) -> list[dict[str, Any]]:
    """What held-out prompts showed as training went on: step, seconds of training so far, gold, learned score, KL."""
    points: list[dict[str, Any]] = []
    seconds = 0.0
    for line in read_metrics(run):
        seconds += line.get("time/step_s", 0.0)
        if "eval/gold" in line:
            seen = {name: line.get(f"eval/{name}") for name in ("gold", "score", "kl")}  # DPO has no score
            points.append({"step": line["step"], "seconds": seconds, **seen})
    return points
