"""The one workload of the memory benchmark, this project's recipe for it, and processes that are measured from outside.

Imports nothing heavy: on Linux a child's peak also counts what its parent held before the child's program began.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROMPT_TOKENS = 64
"""Prompts of the workload are at most this long: one token a byte."""
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What every system does, in the peers' words."""

    shape: str
    """One of `peers/make_model.py`'s model shapes."""
    batch: int
    """Sequences per update."""
    response: int
    """Tokens of every response, no fewer and no more."""
    micro: int
    """Rows per forward of the update."""
    rank: int
    """Of the LoRA sets, on all linears."""
    updates: int
    """PPO updates of a run; the first is not timed."""

    @property
    def micro_batch_tokens(self) -> int:
        """What `micro` rows are in this project's words."""
        return self.micro * (PROMPT_TOKENS + self.response)

    def peer_options(self) -> list[str]:
        """The same for the scripts in `peers/`."""
        numbers = {
            "updates": self.updates,
            "batch": self.batch,
            "response": self.response,
            "micro": self.micro,
            "rank": self.rank,
        }
        return [text for name, number in numbers.items() for text in (f"--{name}", str(number))]


def make_workload(folder: Path, shape: str) -> None:
    """Write model, tokenizer and prompts; in a process of its own, so that this one stays small."""
    command = [sys.executable, str(HERE / "peers" / "make_model.py"), str(folder), shape]
    run_measured(command, threads=1)


def recipe(work: Path, workload: Workload, *, checkpointing: str, budget: str, name: str) -> dict[str, Any]:
    """hydra-ppo on the workload: one epoch, one minibatch, reward head and reference on the base, as in TRL's run."""
    model = str(work / "model")
    return {
        "name": name,
        "output_dir": str(work / "runs"),
        "method": "hydra-ppo",
        "data": {
            "train": str(work / "pairs.jsonl"),
            "max_prompt_tokens": PROMPT_TOKENS,
            "max_response_tokens": workload.response,
        },
        "model": {"path": model, "dtype": "float32", "device": "cpu", "offline": True},
        "lora": {"rank": workload.rank, "alpha": 2.0 * workload.rank},
        "start": {"hydra_sft": model},
        "memory": {"checkpointing": checkpointing, "budget": budget},
        "ppo": {
            "num_steps": workload.updates,
            "rollout_batch_size": workload.batch,
            "minibatch_size": workload.batch,
            "num_epochs": 1,
            "micro_batch_tokens": workload.micro_batch_tokens,
            "sampling": {
                "max_response_tokens": workload.response,
                "min_response_tokens": workload.response,
                "temperature": 0.7,
            },
            "actor_learning_rate": 1e-5,
            "critic_learning_rate": 1e-5,
            "eval_every": 0,
            "save_every": 0,
        },
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A finished process."""

    output: str
    """Its standard output."""
    peak_rss_mib: float
    """Highest resident memory of its whole life, as the kernel counted it."""
    load_before: tuple[float, float, float]
    """The machine's load averages when it began."""


def run_measured(command: Sequence[str], *, threads: int, environment: Mapping[str, str] | None = None) -> Measured:
    """Run a command to its end and measure it. Raises `SystemExit` with its last words where it fails."""
    load_before = os.getloadavg()
    settings = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **(environment or {})}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, env={**os.environ, **settings})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed ({process.returncode}):\n{errors.read()[-4000:]}")
        peak = usage.ru_maxrss / (MIB if sys.platform == "darwin" else MIB // 1024)
        return Measured(output=output.read(), peak_rss_mib=peak, load_before=load_before)


def last_json(text: str) -> dict[str, Any]:
    """The JSON object on the last line of a program's output."""
    return json.loads(text.strip().splitlines()[-1])
