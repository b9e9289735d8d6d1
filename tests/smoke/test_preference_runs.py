"""dpo and simpo from data to report, and every command on what such a run leaves: it has no reward head."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_code_shape import documented_metrics

from hydra_rlhf.model.roles import methods_with
from hydra_rlhf.reporting.render import render_report
from hydra_rlhf.stages.pipeline import run_recipe
from smoke.test_methods_run import OF_PREFERENCE
from smoke.tiny_runs import exit_code, keys_of, metric_lines, recipe, stable_text, write_recipe

PREFERENCE = {
    "preference__batch_size": 16,
    "preference__num_epochs": 0.5,
    "preference__learning_rate": 1e-2,
    "preference__eval_every": 1,
    "preference__max_eval_rows": 4,
    "preference__num_eval_prompts": 2,
}
"""A few steps of some pairs."""


def run(folder: Path, **changes: Any) -> Path:
    """Run the tiny recipe to the end."""
    return run_recipe(recipe(folder, **PREFERENCE, **changes))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of each method, and of hydra-ppo."""
    folder = tmp_path_factory.mktemp("preference")
    for method in (*methods_with("preference"), "hydra-ppo"):
        run(folder, name=method, method=method)
    return folder


@pytest.mark.parametrize("method", methods_with("preference"))
def test_a_run_from_data_to_report(method: str, runs: Path) -> None:
    folder = runs / method
    lines = metric_lines(folder)
    assert list(dict.fromkeys(line["stage"] for line in lines)) == ["sft", "preference", "evaluation"]
    assert OF_PREFERENCE <= keys_of(folder) <= documented_metrics()
    first, *_, last = (line for line in lines if line["stage"] == "preference")
    assert last["eval/preference_loss"] < first["eval/preference_loss"]
    assert {"eval/gold", "eval/kl", "eval/pair_accuracy"} <= last.keys()
    assert "eval/score" not in last
    assert "adapter_model.safetensors" in {path.name for path in (folder / "preference" / "actor").iterdir()}
    assert load_file(folder / "preference" / "actor" / "adapter_model.safetensors")
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 <= summary["gold_win_rate"] <= 1
    assert summary["score_mean"] is summary["score_win_rate"] is summary["reward_accuracy"] is None
    assert summary["kl"] != 0
    memory = json.loads((folder / "memory.json").read_text())
    assert set(memory["plan"]) == set(methods_with("preference"))
    assert list(memory["plan"][method]) == ["sft", "preference", "rollout"]
    assert set(memory["roles"]) == {"actor", "reference"}
    page = render_report(folder).read_text()
    assert "Stage 2: Preference training" in page
    assert "Stage 2: PPO" not in page
    assert "PPO steps" not in page
    assert "Score win rate" not in page


def test_resume_repeats_a_run_that_was_cut_off(runs: Path, tmp_path: Path) -> None:
    """All of stage 2 after its first checkpoint is lost, and made again to the byte."""
    start = {"start__sft": str(runs / "dpo" / "sft"), "preference__save_every": 1, "runtime__keep_checkpoints": 5}
    whole = run(tmp_path, name="whole", method="dpo", **start)
    cut = tmp_path / "cut"
    run(tmp_path, name="cut", method="dpo", **start)
    text = stable_text(cut)
    for checkpoint in sorted((cut / "checkpoints" / "preference").glob("step-*"))[1:]:
        shutil.rmtree(checkpoint)
    stages = json.loads((cut / "stages.json").read_text())
    del stages["evaluation"]
    stages["preference"]["done"] = False
    (cut / "stages.json").write_text(json.dumps(stages))
    changes = {**PREFERENCE, **start, "name": "cut", "method": "dpo"}
    assert run_recipe(recipe(tmp_path, **changes), resume=True) == cut
    assert stable_text(cut) == text == stable_text(whole)


def test_commands_on_a_run_without_a_reward_head(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dpo, ppo = str(runs / "dpo"), str(runs / "hydra-ppo")
    assert exit_code("sample", dpo, "--num-prompts", "1") == 0
    assert "reference" in capsys.readouterr().out
    assert exit_code("export", dpo, "actor", "--format", "peft") == 0
    assert exit_code("export", dpo, "policy", "--format", "merged") == 0
    assert exit_code("export", dpo, "reward", "--format", "reward-model") == 2
    assert "no reward model to export" in capsys.readouterr().err
    assert exit_code("eval", dpo, "--num-prompts", "3", "--judge", "gold", "--checkpoint", "best") == 0
    assert "gold_win_rate" in capsys.readouterr().out
    assert exit_code("eval", dpo, "--judge", "reward-head") == 2
    assert "has no reward head; name a run that has one" in capsys.readouterr().err
    assert exit_code("eval", dpo, "--best-of", "2") == 2
    assert "--best-of lets a run's reward head pick" in capsys.readouterr().err
    # By default gold alone judges; the best of two is picked by the head of the run that has one.
    assert exit_code("compare", dpo, ppo, "--num-prompts", "3", "--best-of", "2", "--json", "both.json") == 0
    compared = json.loads(Path("both.json").read_text())
    assert [judge["judge"] for judge in compared["judges"]] == ["gold"]
    players = [player["name"] for player in compared["players"]]
    assert {"dpo", "hydra-ppo", "best of 2"} < set(players)
    assert exit_code("compare", dpo, "--num-prompts", "2", "--best-of", "2") == 2
    judge = f"reward-head:{ppo}"
    assert exit_code("compare", dpo, str(runs / "simpo"), "--num-prompts", "2", "--judge", judge) == 0
    assert exit_code("report", dpo) == 0


def test_plan_bench_and_stages_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_recipe(tmp_path / "dpo.yaml", output_dir=str(tmp_path), method="dpo", **PREFERENCE)
    assert exit_code("plan", str(file), "--budget", "2GiB", "--method", "dpo", "--method", "simpo") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Of 2 methods 2 fit 2 GiB: dpo, simpo." in said
    assert "pairs of 2 x (32 + 16) tokens" in said
    assert "rollouts of" not in said
    assert exit_code("plan", str(file), "--probe", "--method", "dpo") == 2
    assert "--probe runs one PPO step" in capsys.readouterr().err
    assert exit_code("bench", "--method", "dpo", "--shape", "scratch:tiny") == 2
    assert "--method dpo: a benchmark is of PPO steps" in capsys.readouterr().err
    assert exit_code("ppo", str(file)) == 2
    assert "method=dpo has no stage ppo; it has sft, preference, evaluation" in capsys.readouterr().err


def test_a_reward_function_scores_the_evaluation(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What scores in PPO may be listed all the same: looks and evaluation then have scores."""
    (tmp_path / "rewards_of_preference.py").write_text(
        "def letters(prompts, responses, **columns):\n    return [float(len(set(text))) for text in responses]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    folder = run(
        tmp_path,
        name="scored",
        method="simpo",
        start__sft=str(runs / "simpo" / "sft"),
        ppo__reward__reward_fn="rewards_of_preference:letters",
    )
    assert "eval/score" in next(line for line in metric_lines(folder) if line["stage"] == "preference")
    assert json.loads((folder / "summary.json").read_text())["score_win_rate"] is not None
