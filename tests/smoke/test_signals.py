"""SIGTERM and SIGINT: the run stops at a safe point with a checkpoint, says so by its exit code, and can go on."""

import json
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hydra_rlhf.runtime.checkpoint import CheckpointStore
from smoke.tiny_runs import finish, stable_lines, start, write_recipe

CHANGES: dict[str, Any] = {
    "hydra_sft": {"batch_size": 8, "num_epochs": 2, "learning_rate": 3e-3, "save_every": 50, "eval_every": 0},
    "ppo__num_steps": 12,
    "ppo__save_every": 50,
    "ppo__eval_every": 0,
    "ppo__sampling": {"max_response_tokens": 12},
}
"""Some twenty steps of stage 1 and twelve of PPO; without a signal there is a checkpoint at each stage's end only."""
STOPS = [
    ("hydra_sft", 1, signal.SIGTERM),
    ("hydra_sft", 4, signal.SIGINT),
    ("ppo", 1, signal.SIGTERM),
    ("ppo", 4, signal.SIGINT),
]
"""(stage, steps that must have been logged, signal)."""

SLOW_REWARD = """
import pathlib, time

def slow(prompts, responses, **columns):
    pathlib.Path("called").touch()
    time.sleep(60)
    return [0.0 for _ in responses]
"""


def begin(folder: Path, *flags: str) -> subprocess.Popen[str]:
    """Start the run of `folder/recipe.yaml`."""
    return start("run", "recipe.yaml", *flags, cwd=folder)


def wait_for(process: subprocess.Popen[str], is_so: Any) -> None:
    """Wait until something is so; fails where the process ends before."""
    for _ in range(60_000):
        if is_so():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    raise AssertionError("waited for two minutes")


def num_logged(run: Path, stage: str) -> int:
    """Whole lines of a stage in metrics.jsonl."""
    file = run / "metrics.jsonl"
    return file.read_text().count(f'{{"stage": "{stage}"') if file.exists() else 0


def has_logged(run: Path, stage: str, num_lines: int) -> bool:
    """Whether there are that many lines of a stage."""
    return num_logged(run, stage) >= num_lines


@pytest.mark.slow
def test_stopped_in_both_stages_by_both_signals_and_then_finished(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tiny"
    write_recipe(tmp_path / "recipe.yaml", **CHANGES)
    for stage, after, number in STOPS:
        process = begin(tmp_path, "--resume")
        logged_before = num_logged(run, stage)
        # Lines of an earlier life behind its checkpoint are cut away first, so count what this life adds.
        wait_for(process, partial(has_logged, run, stage, max(after, logged_before + 1)))
        process.send_signal(number)
        code, output = finish(process)
        assert code == 128 + number, output
        assert "stopping at the next safe point" in output
        assert f"Interrupted: stopped by signal {int(number)}; continue with --resume" in output
        assert "Traceback" not in output
        stages = json.loads((run / "stages.json").read_text())
        assert list(stages)[-1] == stage
        assert not stages[stage]["done"], f"the signal came too late for stage {stage}"
        found = CheckpointStore(run / "checkpoints" / stage, 2).latest_valid()
        if stage == "hydra_sft":  # a step of stage 1 is always finished and then saved
            assert found is not None
            assert found.step == num_logged(run, stage)
        elif found is not None:  # in PPO the signal may also end a rollout, which is then done again
            assert found.problems == ()
            assert found.step <= num_logged(run, stage)
    code, output = finish(begin(tmp_path, "--resume"))
    assert code == 0, output

    straight = tmp_path / "straight"
    straight.mkdir()
    write_recipe(straight / "recipe.yaml", **CHANGES)
    code, output = finish(begin(straight))
    assert code == 0, output
    assert stable_lines(run) == stable_lines(straight / "runs" / "tiny")
    assert num_logged(run, "ppo") == 12


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(number: signal.Signals, tmp_path: Path) -> None:
    """A reward function sleeps for a minute; the first signal waits for it, the second does not."""
    (tmp_path / "slow_reward.py").write_text(SLOW_REWARD)
    write_recipe(
        tmp_path / "recipe.yaml",
        sft={"batch_size": 64, "num_epochs": 0.1, "eval_every": 0},
        ppo__reward={"reward_fn": "slow_reward:slow", "reward_model_coef": 0.0},
    )
    process = begin(tmp_path)
    assert process.stdout is not None
    wait_for(process, (tmp_path / "called").exists)
    began = time.monotonic()
    process.send_signal(number)
    lines = iter(process.stdout.readline, "")
    assert any("the same signal again stops at once" in line for line in lines)
    assert process.poll() is None, "one signal should not end it inside a step"
    process.send_signal(number)
    code, output = finish(process)
    assert code == 128 + number
    assert "stopped at once" in output
    assert time.monotonic() - began < 30
    assert CheckpointStore(tmp_path / "runs/tiny/checkpoints/sft", 2).latest_valid() is not None
