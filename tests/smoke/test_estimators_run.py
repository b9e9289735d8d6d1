"""Runs without a critic from end to end: every command works on them, and none of them finds a critic."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from test_code_shape import documented_metrics

from hydra_rlhf import HydraModel, PPOConfig, train_ppo
from hydra_rlhf.config import LoraConfig
from hydra_rlhf.config_checks import GROUP_ESTIMATORS
from hydra_rlhf.errors import CheckpointError, ConfigError
from hydra_rlhf.model.roles import ROLES, without_roles
from hydra_rlhf.reporting.collect import read_run
from hydra_rlhf.reporting.render import render_report
from hydra_rlhf.stages.estimators import ESTIMATORS
from hydra_rlhf.stages.pipeline import run_recipe
from smoke.tiny_runs import exit_code, keys_of, metric_lines, recipe

GROUPS: dict[str, Any] = {"ppo__rollout_batch_size": 2, "ppo__samples_per_prompt": 2}
TABLE = without_roles(ROLES["hydra-ppo"], "critic")


@pytest.fixture(scope="module")
def grpo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of every stage with GRPO."""
    return run_recipe(recipe(tmp_path_factory.mktemp("grpo"), ppo__advantage_estimator="grpo", **GROUPS))


def test_nothing_of_a_critic_is_logged_saved_or_reported(grpo_run: Path) -> None:
    logged = keys_of(grpo_run)
    assert logged <= documented_metrics()
    assert {"loss/kl", "score/flat_group_frac"} <= logged, "GRPO has its KL in the loss, and compares"
    assert not [key for key in logged if "critic" in key or "value" in key or "variance" in key]
    assert sorted(path.name for path in (grpo_run / "ppo").iterdir()) == ["actor"]
    for file in (grpo_run / "checkpoints").rglob("*.safetensors"):
        with safe_open(file, framework="pt") as held:
            assert not [key for key in held.keys() if "critic" in key or "value" in key]  # noqa: SIM118
    memory = json.loads((grpo_run / "memory.json").read_text())
    assert set(memory["roles"]) == set(TABLE)
    # Planned and counted: without a critic both hydra methods are one.
    for known in (memory["methods"], memory["plan"]):
        assert known["hydra-ppo"] == known["j-hydra-ppo"]
    record = read_run(grpo_run)
    assert dict(record.roles) == dict(TABLE)
    page = render_report(grpo_run).read_text()
    assert "Explained variance" not in page
    assert "Value loss" not in page
    (grpo_run / "memory.json").rename(grpo_run / "aside.json")  # an unfinished run has none
    try:
        assert dict(read_run(grpo_run).roles) == dict(TABLE)
    finally:
        (grpo_run / "aside.json").rename(grpo_run / "memory.json")


def test_every_command_works_on_such_a_run(
    grpo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = str(grpo_run)
    assert exit_code("eval", run, "--num-prompts", "2", "--judge", "gold", "--best-of", "2") == 0
    assert exit_code("compare", run, "--num-prompts", "2") == 0
    assert exit_code("sample", run, "--num-prompts", "1") == 0
    for kind in ("peft", "merged", "reward-model"):
        assert exit_code("export", run, str(tmp_path / kind), "--format", kind) == 0
    assert exit_code("report", run) == 0
    capsys.readouterr()


def test_a_finished_run_goes_on_for_further_steps(grpo_run: Path, tmp_path: Path) -> None:
    """And another estimator is refused once PPO has begun."""
    start = {"start__hydra_sft": str(grpo_run / "hydra_sft"), "ppo__advantage_estimator": "remax"}
    folder = run_recipe(recipe(tmp_path, **start))
    more = recipe(tmp_path, ppo__num_steps=3, **start)
    assert run_recipe(more, resume=True) == folder
    steps = [line["step"] for line in metric_lines(folder) if line["stage"] == "ppo"]
    assert steps == [1, 2, 3]
    with pytest.raises(CheckpointError, match=r"ppo\.advantage_estimator: remax -> reinforce"):
        run_recipe(
            recipe(tmp_path, ppo__num_steps=3, **(start | {"ppo__advantage_estimator": "reinforce++"})), resume=True
        )


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name not in ("gae", "grpo", "remax")])
def test_the_other_estimators_run(name: str, grpo_run: Path, tmp_path: Path) -> None:
    groups = GROUPS if name in GROUP_ESTIMATORS else {}
    method = "j-hydra-ppo" if name == "rloo" else "hydra-ppo"
    start = {"start__hydra_sft": str(grpo_run / "hydra_sft"), "method": method}
    folder = run_recipe(recipe(tmp_path, ppo__advantage_estimator=name, ppo__num_epochs=1, **start, **groups))
    lines = [line for line in metric_lines(folder) if line["stage"] == "ppo"]
    assert [line["step"] for line in lines] == [1, 2]
    assert ("loss/kl" in lines[0]) == (name == "dr-grpo")
    assert abs(lines[1]["kl/reference"]) > 1e-3, "the actor learns"


def test_the_python_functions(grpo_run: Path) -> None:
    folder = str(grpo_run / "hydra_sft")
    model = HydraModel.from_pretrained(folder, with_critic=False, lora=LoraConfig(rank=2, alpha=4.0))
    assert dict(model.table) == dict(TABLE)
    sizes: dict[str, Any] = {"num_steps": 1, "rollout_batch_size": 2, "sampling": {"max_response_tokens": 6}}
    config = PPOConfig(advantage_estimator="rloo", samples_per_prompt=2, minibatch_size=4, **sizes)
    (line,) = train_ppo(model, ["How much is the clock?", "Where is the cup?"], config)
    assert math.isfinite(line["loss/policy"])
    with pytest.raises(ConfigError, match="with_critic=True"):
        train_ppo(model, ["How much is the clock?"], PPOConfig(minibatch_size=2, **sizes))


def test_plan_and_bench_see_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--ppo.advantage-estimator", "rloo", "--ppo.samples-per-prompt", "2")
    peaks = {}
    for name, more in (("rloo", options), ("gae", options[2:])):
        model = ("--model", "scratch:tiny", "--budget", "2GiB", "--method", "hydra-ppo")
        capsys.readouterr()
        probe = ("--probe",) if name == "rloo" else ()
        assert exit_code("plan", *model, *probe, "--json", *more) == 0
        planned = json.loads(capsys.readouterr().out)["methods"]["hydra-ppo"]
        peaks[name] = planned["stages"]["ppo"]["phases"]["update"]
    assert peaks["rloo"]["adapters"] < peaks["gae"]["adapters"]
    assert peaks["rloo"]["optimizer"] < peaks["gae"]["optimizer"]
    file = tmp_path / "bench.json"
    sizes = ("--batch", "4", "--prompt-tokens", "4", "--response-tokens", "3", "--rank", "2", "--iterations", "1")
    shape = ("--shape", "scratch:tiny", "--device", "cpu", "--method", "hydra-ppo", "--compare", "batch")
    assert exit_code("bench", *shape, *sizes, "--json", str(file), *options) == 0
    found = json.loads(file.read_text())
    (row,) = found["equal_batch"]
    assert (found["advantage_estimator"], found["samples_per_prompt"]) == ("rloo", 2)
    assert (row["status"], row["batch"]) == ("measured", 4)
    assert row["measured_bytes"] == pytest.approx(row["planned_bytes"], rel=0.1)
    assert exit_code("bench", *shape, *sizes, *options, "--ppo.samples-per-prompt", "3") == 2
    assert "multiple of ppo.samples_per_prompt" in capsys.readouterr().err
