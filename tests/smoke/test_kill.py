"""kill -9 at any moment, `--resume`, and the finished run is the uninterrupted one; who else may touch a run folder."""

import fcntl
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from smoke.tiny_runs import exit_code, finish, metric_lines, stable_lines, stable_text, start, write_recipe

NUM_KILLS = 10
STAGES = ("hydra_sft", "ppo")
PPO_STEPS = 12
CHANGES: dict[str, Any] = {
    "data__world_pairs": 120,
    "hydra_sft": {"batch_size": 16, "learning_rate": 3e-3, "save_every": 2, "eval_every": 3, "max_eval_rows": 4},
    "ppo__num_steps": PPO_STEPS,
    "ppo__rollout_batch_size": 8,
    "ppo__minibatch_size": 4,
    "ppo__num_epochs": 2,
    "ppo__kl_target": 2.0,
    "ppo__kl_horizon": 100,
    "ppo__reward": {"normalize": True},
    "ppo__sampling": {"max_response_tokens": 10},
    "ppo__save_every": 2,
    "ppo__eval_every": 3,
    "ppo__num_logged_samples": 2,
}


def begin(folder: Path, *flags: str) -> subprocess.Popen[str]:
    """Start the run of `folder/recipe.yaml`."""
    return start("run", "recipe.yaml", *flags, cwd=folder)


def wait_until_open(process: subprocess.Popen[str], folder: Path) -> float:
    """Wait until the process works on the run folder, imports behind it; returns that moment (monotonic seconds)."""
    lock = folder / "runs" / "tiny" / ".lock"
    for _ in range(60_000):
        if process.poll() is not None or (lock.exists() and lock.read_text().strip() == str(process.pid)):
            return time.monotonic()
        time.sleep(0.002)
    raise AssertionError("the process never opened its run folder")


def steps_saved(run: Path) -> int:
    """How many steps of both stages lie before the newest checkpoints: where a resumed process goes on from."""
    return sum(
        max((int(path.name[5:]) for path in (run / "checkpoints" / stage).glob("step-*")), default=0)
        for stage in STAGES
    )


def is_done(run: Path) -> bool:
    """Whether every stage of the run is done; the report may still be missing."""
    file = run / "stages.json"
    return file.exists() and json.loads(file.read_text()).get("evaluation", {}).get("done", False)


def tensor_hashes(run: Path) -> dict[str, str]:
    """SHA-256 of every file of tensors that a run leaves, the final checkpoints included."""
    files = [*run.rglob("*.safetensors")]
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """(run folder, seconds of work) of the uninterrupted run: imports and the report are not counted."""
    folder = tmp_path_factory.mktemp("straight")
    write_recipe(folder / "recipe.yaml", **CHANGES)
    process = begin(folder)
    opened = wait_until_open(process, folder)
    run = folder / "runs" / "tiny"
    while process.poll() is None and not is_done(run):
        time.sleep(0.01)
    seconds = time.monotonic() - opened
    code, output = finish(process)
    assert code == 0, output
    assert [line["step"] for line in metric_lines(run) if line["stage"] == "ppo"] == [*range(1, PPO_STEPS + 1)]
    assert steps_saved(run) == len(metric_lines(run)) - 1, "all but the line of the evaluation are steps"
    assert len({line["kl/coef"] for line in metric_lines(run) if "kl/coef" in line}) > 6, "the controller should steer"
    return run, seconds


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_as_if_it_had_not_been(straight: tuple[Path, float], tmp_path: Path) -> None:
    expected, seconds = straight
    write_recipe(tmp_path / "recipe.yaml", **CHANGES)
    run = tmp_path / "runs" / "tiny"
    # One random moment in each tenth of the run, so that they are spread over all of it.
    rng = random.Random(20230904)
    codes: list[int] = []
    hits: list[int] = []
    for number in range(NUM_KILLS):
        fraction = (number + rng.random()) / NUM_KILLS
        process = begin(tmp_path, "--resume")
        wait_until_open(process, tmp_path)
        # As far into the run as the fraction says; where a life starts behind it, a moment after its start.
        time.sleep(max(0.02, (fraction - steps_saved(run) / steps_saved(expected)) * seconds))
        process.send_signal(signal.SIGKILL)
        codes.append(finish(process)[0])
        if codes[-1] == -signal.SIGKILL and not is_done(run):
            hits.append((run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0)
    assert set(codes) <= {-signal.SIGKILL, 0}
    assert len(hits) >= NUM_KILLS / 2, f"too few kills hit a run that was not done: {codes}, lines logged {hits}"
    assert len(set(hits)) >= 3, f"the kills should be spread over the run: lines logged {hits}"

    code, output = finish(begin(tmp_path, "--resume"))
    assert code == 0, output
    assert stable_lines(run) == stable_lines(expected)
    assert stable_text(run) == stable_text(expected)
    assert (run / "samples.jsonl").read_bytes() == (expected / "samples.jsonl").read_bytes()
    hashes = tensor_hashes(expected)
    assert {Path(name).parts[0] for name in hashes} == {"hydra_sft", "ppo", "checkpoints"}
    assert f"checkpoints/ppo/step-{PPO_STEPS:06d}/optimizer-1.safetensors" in hashes
    assert tensor_hashes(run) == hashes
    # Nothing that a kill left half done is still there.
    assert not [
        path for path in run.rglob("*") if path.name.startswith(("tmp-", "trash-", "aside-", "tokenizer-draft"))
    ]
    ends = [json.loads((folder / "summary.json").read_text()) for folder in (run, expected)]
    for end in ends:
        del end["wall_s"], end["peak_rss_bytes"]
    assert ends[0] == ends[1]


def test_the_comparison_of_texts_sees_everything_but_time_and_memory(straight: tuple[Path, float]) -> None:
    text = stable_text(straight[0])
    assert [set(json.loads(line)) for line in text.splitlines()] == [set(line) for line in stable_lines(straight[0])]
    assert not re.search(r'"(time|memory)/|_per_s"', text)


def test_a_finished_run_is_resumed_without_doing_anything(straight: tuple[Path, float]) -> None:
    run, _ = straight
    before = tensor_hashes(run), (run / "metrics.jsonl").read_bytes()
    code, output = finish(begin(run.parents[1], "--resume"))
    assert code == 0, output
    assert (tensor_hashes(run), (run / "metrics.jsonl").read_bytes()) == before


def test_a_second_process_on_the_same_folder_is_refused(
    straight: tuple[Path, float], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another process holds the lock, as a living run does; this one must end at once and say who it is."""
    run, _ = straight
    monkeypatch.chdir(run.parents[1])
    before = (run / "metrics.jsonl").read_bytes()
    with (run / ".lock").open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.write(f"{os.getppid()}\n")
        held.flush()
        assert exit_code("run", "recipe.yaml", "--resume") == 2
    error = capfd.readouterr().err
    assert f"in use by process {os.getppid()}" in error
    assert "Traceback" not in error
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_changed_recipe_is_refused_with_the_setting_named(
    straight: tuple[Path, float], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(straight[0].parents[1])
    assert exit_code("run", "recipe.yaml", "--resume", "--ppo.kl-coef", "0.5") == 2
    error = capfd.readouterr().err
    assert "ppo.kl_coef: 0.02 -> 0.5" in error
    assert "Traceback" not in error


def test_an_existing_run_is_not_overwritten(
    straight: tuple[Path, float], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(straight[0].parents[1])
    before = tensor_hashes(straight[0])
    assert exit_code("run", "recipe.yaml") == 2
    error = capfd.readouterr().err
    assert "continue it with --resume" in error
    assert "Traceback" not in error
    assert tensor_hashes(straight[0]) == before
