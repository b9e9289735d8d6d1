import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hydra_rlhf.config import DataConfig, PPOConfig, Recipe
from hydra_rlhf.errors import CheckpointError, Interrupted
from hydra_rlhf.recipes import recipe_differences
from hydra_rlhf.runtime.run import Run, read_recipe

HOLDER = """
import sys
from hydra_rlhf.config import Recipe
from hydra_rlhf.runtime.run import Run
with Run.open(Recipe(name="a", output_dir=sys.argv[1]), resume=False):
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    return Recipe(name="a", output_dir=str(tmp_path / "runs"), ppo=PPOConfig(kl_coef=1e-5, num_steps=4))


def lines(run: Run, name: str = "metrics.jsonl") -> list[dict[str, object]]:
    path = run.folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((2,), float(step))}}


def test_a_new_run_writes_its_settings_and_environment(recipe):
    with Run.open(recipe, resume=False) as run:
        assert run.folder == Path(recipe.output_dir) / "a"
        assert sorted(os.listdir(run.folder)) == [".lock", "checkpoints", "environment.json", "recipe.yaml"]
        environment = run.read_json("environment.json")
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["versions"]["python"] == ".".join(str(part) for part in sys.version_info[:3])
    assert environment["hardware"]["cores"] >= 1
    assert environment["hardware"]["torch_threads"] == torch.get_num_threads()
    assert environment["hardware"]["memory_bytes"] > 2**28
    assert set(environment) == {"versions", "hardware", "git", "started"}
    assert read_recipe(run.folder) == recipe
    assert Run.load(run.folder).recipe == recipe


def test_an_existing_run_needs_resume_and_is_left_alone_without(recipe):
    with Run.open(recipe, resume=False) as run:
        run.log("ppo", 1, {"x": 1.0})
    before = {path: path.read_bytes() for path in run.folder.glob("*.*") if path.name != ".lock"}
    with pytest.raises(CheckpointError, match=r"runs/a holds a run already; continue it with --resume, choose another"):
        Run.open(recipe, resume=False)
    with Run.open(recipe, resume=True):
        pass
    assert {path: path.read_bytes() for path in before} == before


def test_a_folder_of_something_else_is_refused_and_left_alone(recipe):
    folder = Path(recipe.output_dir) / "a"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("x")
    for resume in (False, True):
        with pytest.raises(CheckpointError, match="not empty and not a run folder"):
            Run.open(recipe, resume=resume)
    assert os.listdir(folder) == ["thesis.tex"]


def test_resuming_nothing_starts_a_run_and_says_so(recipe, caplog):
    with Run.open(recipe, resume=True) as run:
        assert read_recipe(run.folder) == recipe
    assert "holds no run yet" in caplog.text


def test_a_start_that_was_killed_at_once_can_be_repeated(recipe):
    folder = Path(recipe.output_dir) / "a"
    folder.mkdir(parents=True)
    (folder / ".lock").write_text("1\n")
    (folder / ".recipe.yaml.1").write_text("half a fi")
    with Run.open(recipe, resume=False) as run:
        assert read_recipe(run.folder) == recipe


def test_a_run_that_stopped_before_its_first_step_begins_anew_with_other_settings(recipe):
    with Run.open(recipe, resume=False) as run:
        run.begin_stage("ppo")
    with Run.open(replace(recipe, seed=3), resume=False) as run:
        assert read_recipe(run.folder).seed == 3


def test_changed_settings_are_refused_with_what_differs(recipe):
    with Run.open(recipe, resume=False) as run:
        run.begin_stage("ppo")
        run.log("ppo", 1, {})
    changed = replace(recipe, seed=3, ppo=replace(recipe.ppo, kl_coef=0.05), data=DataConfig(columns={"prompt": "q"}))
    with pytest.raises(CheckpointError) as caught:
        Run.open(changed, resume=True)
    message = str(caught.value)
    assert "ppo.kl_coef: 1e-05 -> 0.05" in message
    assert "seed: 0 -> 3" in message
    assert "data.columns.prompt: (none) -> q" in message
    assert message.count("->") == 4  # one more in "(run -> now)"
    with Run.open(recipe, resume=True):
        pass


def test_differences_by_hand():
    old = {"a": 1, "b": {"c": [1, 2], "d": None}, "gone": 0}
    new = {"a": 1, "b": {"c": [1, 3], "d": "x"}, "new": {"k": 1}}
    expected = ["b.c: [1, 2] -> [1, 3]", "b.d: None -> x", "gone: 0 -> (none)", "new: (none) -> {'k': 1}"]
    assert recipe_differences(old, new) == expected
    assert recipe_differences(old, old) == []


def test_secrets_in_settings_are_not_written_and_do_not_prevent_a_resume(recipe):
    address = "https://me:hunter2@example.org/rows.jsonl?api_key=abc123&x=1"
    recipe = replace(recipe, data=DataConfig(train=address))
    for resume in (False, True):
        with Run.open(recipe, resume=resume) as run:
            pass
    written = "".join(path.read_text() for path in run.folder.iterdir() if path.is_file())
    assert "hunter2" not in written
    assert "abc123" not in written
    assert read_recipe(run.folder).data.train == "https://***@example.org/rows.jsonl?api_key=***&x=1"


def test_nothing_of_the_process_environment_is_written(recipe, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_thisisasecret")
    with Run.open(recipe, resume=False) as run:
        pass
    assert all("hf_thisisasecret" not in path.read_text() for path in run.folder.iterdir() if path.is_file())


def test_a_second_process_is_refused_until_the_first_is_gone(recipe):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDER, recipe.output_dir], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    assert first.stdin is not None
    assert first.stdout.readline() == "holds\n"
    recipe = Recipe(name="a", output_dir=recipe.output_dir)
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=rf"runs/a is in use by process {first.pid}; wait"):
            Run.open(recipe, resume=resume)
    first.kill()
    first.wait(timeout=20)
    first.stdout.close()
    first.stdin.close()
    with Run.open(recipe, resume=True), pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}"):
        Run.open(recipe, resume=True)
    Run.open(recipe, resume=True).__exit__(
        None, None, None
    )  # closed by the block above, in spite of the refused attempt


def test_stages_are_begun_once_and_done_for_good(recipe):
    with Run.open(recipe, resume=False) as run:
        assert not run.stage_done("sft")
        run.begin_stage("sft")
        run.log("sft", 1, {"x": 1.0})
    with Run.open(recipe, resume=True) as run:
        assert not run.stage_done("sft")
        run.begin_stage("sft")
        assert run.restore("sft") is None
        assert lines(run) == []  # the interrupted stage had no checkpoint, so it starts over
        run.log("sft", 1, {"x": 2.0})
        run.finish_stage("sft")
    with Run.open(recipe, resume=True) as run:
        assert run.stage_done("sft")
        with pytest.raises(AssertionError, match="is done"):
            run.begin_stage("sft")
        run.begin_stage("ppo")
        assert run.restore("ppo") is None
        assert [line["x"] for line in lines(run)] == [2.0]
        assert run.read_json("stages.json")["ppo"] == {
            "done": False,
            "metrics_bytes": len('{"stage": "sft", "step": 1, "x": 2.0}\n'),
            "samples_bytes": 0,
        }


def test_restore_cuts_both_files_back_to_the_checkpoint(recipe):
    with Run.open(recipe, resume=False) as run:
        run.begin_stage("ppo")
        for step in (1, 2, 3):
            run.log("ppo", step, {"x": 0.5})
            run.log_sample({"stage": "ppo", "step": step, "prompt": "hi"})
            if step == 2:
                run.save_checkpoint("ppo", step, tensors(step), {"step": step}, protect={1})
        with (run.folder / "metrics.jsonl").open("a") as file:
            file.write('{"half a li')
    with Run.open(recipe, resume=True) as run:
        found = run.restore("ppo")
        assert found is not None
        assert (found.step, found.state, found.tensors["model"]["w"].tolist()) == (2, {"step": 2}, [2.0, 2.0])
        assert [line["step"] for line in lines(run)] == [1, 2]
        assert [line["step"] for line in lines(run, "samples.jsonl")] == [1, 2]
        run.log("ppo", 3, {"x": 0.5})
    assert [line["step"] for line in lines(run)] == [1, 2, 3]


def test_restore_passes_over_a_damaged_checkpoint_and_cuts_back_further(recipe):
    with Run.open(recipe, resume=False) as run:
        run.begin_stage("ppo")
        for step in (1, 2):
            run.log("ppo", step, {})
            run.save_checkpoint("ppo", step, tensors(step), {})
        os.truncate(run.folder / "checkpoints/ppo/step-000002/model.safetensors", 5)
    with Run.open(recipe, resume=True) as run:
        found = run.restore("ppo")
        assert found is not None
        assert (found.step, len(found.problems)) == (1, 1)
        assert [line["step"] for line in lines(run)] == [1]


def test_missing_lines_are_an_error(recipe):
    with Run.open(recipe, resume=False) as run:
        run.begin_stage("ppo")
        run.log("ppo", 1, {})
        run.save_checkpoint("ppo", 1, tensors(1), {})
        (run.folder / "metrics.jsonl").unlink()
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl has 0 bytes.*lines are missing"):
            run.restore("ppo")


def test_keep_checkpoints_is_read_from_the_recipe(recipe):
    recipe = replace(recipe, runtime=replace(recipe.runtime, keep_checkpoints=1))
    with Run.open(recipe, resume=False) as run:
        for step in (1, 2, 3):
            run.save_checkpoint("ppo", step, tensors(step), {}, protect={1})
        assert run.checkpoints("ppo").steps() == [1, 3]
    assert Run.load(run.folder).checkpoints("ppo").load(3).step == 3


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path, recipe):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*file/a: Not a directory"):
        Run.open(replace(recipe, output_dir=str(tmp_path / "file")), resume=False)


def test_a_folder_that_is_removed_during_the_run_is_a_clear_error_and_stays_removed(tmp_path, recipe):
    with Run.open(recipe, resume=False) as run:
        run.begin_stage("ppo")
        run.folder.rename(tmp_path / "moved")
        with pytest.raises(CheckpointError, match=r"cannot write .*metrics\.jsonl"):
            run.log("ppo", 1, {})
        with pytest.raises(CheckpointError, match=r"cannot write .*checkpoints/ppo"):
            run.save_checkpoint("ppo", 1, tensors(1), {})
        with pytest.raises(CheckpointError, match=r"cannot write .*summary\.json"):
            run.write_json("summary.json", {})
        with pytest.raises(CheckpointError, match=r"cannot write .*stages\.json"):
            run.finish_stage("ppo")
        assert os.listdir(recipe.output_dir) == []


def test_json_files_are_strict_and_replaced_whole(recipe):
    with Run.open(recipe, resume=False) as run:
        run.write_json("summary.json", {"kl": float("nan"), "ci": [0.1, 0.2]})
        run.write_json("summary.json", {"kl": float("inf")})
        assert Run.load(run.folder).read_json("summary.json") == {"kl": "inf"}
        with pytest.raises(CheckpointError, match=r"memory\.json does not exist"):
            run.read_json("memory.json")
        (run.folder / "memory.json").write_text('{"a":')
        with pytest.raises(CheckpointError, match=r"memory\.json cannot be read"):
            run.read_json("memory.json")


def test_loading_what_is_no_run_names_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a run folder: .*recipe\.yaml does not exist"):
        Run.load(tmp_path)
    (tmp_path / "recipe.yaml").write_text("name: [")
    with pytest.raises(CheckpointError, match=r"recipe\.yaml cannot be read"):
        Run.load(tmp_path)
    (tmp_path / "recipe.yaml").write_text("name: a\nfrom_the_future: 1\n")
    with pytest.raises(CheckpointError, match=r"(?s)does not know.*from_the_future"):
        Run.load(tmp_path)


def test_a_reader_cannot_log(recipe):
    with Run.open(recipe, resume=False) as run, pytest.raises(AssertionError, match="opened for reading"):
        Run.load(run.folder).log("ppo", 1, {})


def test_other_versions_on_resume_are_warned_of(recipe, caplog):
    with Run.open(recipe, resume=False) as run:
        environment = run.read_json("environment.json")
        environment["versions"]["torch"] = "1.0"
        run.write_json("environment.json", environment)
        run.log("ppo", 1, {})
    with Run.open(recipe, resume=True):
        pass
    assert f"torch: 1.0 -> {torch.__version__}" in caplog.text


def test_signals_are_listened_to_inside_the_block_only(recipe, capfd):
    before = signal.getsignal(signal.SIGTERM)
    with Run.open(recipe, resume=False) as run:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            run.stop.check()
    assert signal.getsignal(signal.SIGTERM) == before
