"""What the smoke tests share: one tiny recipe, its variants, the command line in this process and in one of its own."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from hydra_rlhf.cli import main
from hydra_rlhf.config import Recipe
from hydra_rlhf.recipes import lay_over, parse_recipe

ROOT = Path(__file__).resolve().parents[2]

SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "data": {"train": "world", "world_pairs": 80, "max_prompt_tokens": 32, "max_response_tokens": 16},
    "model": {"scratch_vocab_size": 320, "device": "cpu"},
    "lora": {"rank": 2, "alpha": 4.0},
    "sft": {"batch_size": 32, "learning_rate": 3e-3, "eval_every": 2, "max_eval_rows": 4},
    "reward_model": {"batch_size": 32, "learning_rate": 3e-3, "eval_every": 2, "max_eval_rows": 4},
    "hydra_sft": {"batch_size": 32, "learning_rate": 3e-3, "eval_every": 2, "max_eval_rows": 4},
    "ppo": {
        "num_steps": 2,
        "rollout_batch_size": 4,
        "minibatch_size": 2,
        "num_epochs": 2,
        "warmup_frac": 0.0,
        "actor_learning_rate": 1e-2,
        "critic_learning_rate": 1e-2,
        "value_head_learning_rate": 1e-2,
        "sampling": {"max_response_tokens": 6},
        "eval_every": 2,
        "num_eval_prompts": 3,
        "save_every": 1,
        "num_logged_samples": 1,
    },
    "evaluation": {"num_prompts": 3, "num_samples": 2},
    "runtime": {"num_threads": 1},
}
"""A run of every stage in about two seconds: three optimizer steps of stage 1, two PPO steps, an evaluation."""

UNSTABLE = re.compile(r', "(?:(?:time|memory)/[a-z_]+|[a-z]+/[a-z_]+_per_s)": [^,}]+')
"""The only entries of metrics.jsonl that may differ between two runs of one recipe, with the comma before them."""

SOURCE_METRIC = re.compile(r"^reward/[a-z0-9_]+_(mean|std|failed)$")
"""A metric of one reward source; its name stands before the last word."""


def settings(**changes: Any) -> dict[str, Any]:
    """The tiny settings with changes; dots are written as two underscores (`ppo__num_steps=3`)."""
    content = copy.deepcopy(SETTINGS)
    for name, value in changes.items():
        lay_over(content, name.replace("__", "."), value)
    return content


def recipe(folder: Path, **changes: Any) -> Recipe:
    """The tiny recipe with changes; its run folder goes below `folder`."""
    return parse_recipe(settings(output_dir=str(folder), **changes), source="tiny")


def write_recipe(file: Path, **changes: Any) -> Path:
    """The tiny recipe with changes as a YAML file."""
    file.write_text(yaml.safe_dump(settings(**changes), sort_keys=False))
    return file


def exit_code(*argv: str) -> int:
    """Run `hydra-rlhf` in this process and return what the shell would see."""
    try:
        return main(argv)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)


def command(*argv: str) -> list[str]:
    """`hydra-rlhf` as a command line of this interpreter."""
    return [sys.executable, "-m", "hydra_rlhf.cli", *argv]


def environment() -> dict[str, str]:
    """The environment of such a process: this checkout's source, one thread."""
    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def start(*argv: str, cwd: Path) -> subprocess.Popen[str]:
    """Start `hydra-rlhf` in a process of its own; stdout and stderr are kept together."""
    return subprocess.Popen(
        command(*argv), cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 120) -> tuple[int, str]:
    """(return code, output) of a process that ends by itself."""
    output, _ = process.communicate(timeout=timeout_s)
    return process.returncode, output


def metric_lines(folder: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stable_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock or the memory of the process says."""
    return [{key: value for key, value in line.items() if not is_unstable(key)} for line in metric_lines(folder)]


def is_unstable(key: str) -> bool:
    """True for a metric of time or memory."""
    return key.startswith(("time/", "memory/")) or key.endswith("_per_s")


def stable_text(folder: Path) -> str:
    """The same as raw text: metrics.jsonl with these entries cut out, and nothing else touched."""
    return UNSTABLE.sub("", (folder / "metrics.jsonl").read_text())


def keys_of(folder: Path) -> set[str]:
    """Every metric key in metrics.jsonl, those of a reward source under the name that the documents use."""
    keys = {key for line in metric_lines(folder) for key in line} - {"stage", "step"}
    return {SOURCE_METRIC.sub(r"reward/NAME_\1", key) for key in keys}
