"""What users can get wrong: the right exit code and one block that names setting, value and remedy; nothing has run."""

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from contract.tiny import tiny_trunk, tokenizer

from hydra_rlhf.cli import build_parser
from hydra_rlhf.config import DataConfig
from hydra_rlhf.model import hydra
from hydra_rlhf.model.export import save_stage1
from hydra_rlhf.stages import pipeline
from hydra_rlhf.stages.datasets import load_raw
from smoke.tiny_runs import exit_code, lay_over, settings, write_recipe

GOOD_ROW = {"prompt": "where is the cat", "chosen": "on the mat", "rejected": "I do not know"}
Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes or loads a model fails the test."""

    def never(*args: Any, **kwargs: Any) -> None:
        pytest.fail("weights were made or loaded before the error")

    for module, name in ((pipeline, "load_trunk"), (pipeline, "scratch_trunk"), (hydra, "load_trunk")):
        monkeypatch.setattr(module, name, never)


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must end with exit code 2 and one block on stderr, which is returned."""

    def run(error: str, *argv: str) -> str:
        capfd.readouterr()
        code = exit_code(*argv)
        captured = capfd.readouterr()
        assert code == 2, captured.err
        assert captured.err.startswith(f"{error}: "), captured.err
        assert "Traceback" not in captured.err
        assert "\n\n" not in captured.err.strip(), "one block"
        assert captured.out == ""
        return captured.err

    return run


def without_run_folder(tmp_path: Path) -> bool:
    return not (tmp_path / "runs").exists()


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("ppo.klcoef", 0.1, ("unknown setting ppo.klcoef", "did you mean ppo.kl_coef?")),
        ("pppo.num_steps", 3, ("unknown setting pppo", "did you mean ppo?")),
        ("ppo.reward.normalise", True, ("unknown setting ppo.reward.normalise", "did you mean ppo.reward.normalize?")),
        ("ppo.num_steps", "ten", ("ppo.num_steps='ten'", "valid integer")),
        ("ppo.num_steps", 2.5, ("ppo.num_steps=2.5", "integer")),
        ("ppo.num_steps", 0, ("ppo.num_steps=0", "greater than 0")),
        ("ppo.kl_coef", -0.1, ("ppo.kl_coef=-0.1", "greater than or equal to 0")),
        ("ppo.kl_coef", ".nan", ("ppo.kl_coef", "number")),
        ("ppo.sampling.top_p", 1.5, ("ppo.sampling.top_p=1.5", "less than or equal to 1")),
        ("ppo.kl_in", "both", ("ppo.kl_in='both'", "'reward' or 'loss'")),
        ("method", "grpo", ("method='grpo'", "hydra-ppo")),
        ("model.dtype", "float16", ("model.dtype='float16'", "'float32' or 'bfloat16'")),
        ("ppo.reward.sources", [{"name": "a", "kind": "lengths"}], ("ppo.reward.sources.0={", "'length', 'regex'")),
        (
            "ppo.reward.sources",
            [{"name": "a", "kind": "length", "target": 3}, {"name": "b", "kind": "keywords", "wnated": ["c"]}],
            ("unknown setting ppo.reward.sources.1.wnated", "did you mean ppo.reward.sources.wanted?"),
        ),
        ("ppo.reward.sources", [{"name": "A b", "kind": "length", "target": 3}], ("sources.0.name='A b'", "pattern")),
        ("ppo.reward.sources", [{"name": "head", "kind": "length", "target": 3}], ("named 'head'", "is taken")),
        ("ppo.reward.sources", [{"name": "a", "kind": "length"}], ("neither a target nor a maximum", "set one")),
        ("ppo.reward.sources", [{"name": "a", "kind": "keywords"}], ("neither wanted nor unwanted", "name some")),
        ("ppo.reward.sources", [{"name": "a", "kind": "regex", "pattern": "("}], ("pattern '('", "unterminated")),
        (
            "ppo.reward.sources",
            [{"name": "a", "kind": "function", "function": "a:b", "timeout_s": 3}],
            ("timeout_s=3", "isolate: true"),
        ),
        ("ppo.reward.sources", [{"name": "a", "kind": "http", "url": "http://u:p@x/"}], ("sources.0.url", "pattern")),
        ("ppo.reward.normalize", "yes please", ("ppo.reward.normalize='yes please'", "boolean")),
        ("ppo", 3, ("ppo=3", "object")),
        ("name", "runs/mine", ("name='runs/mine'", "pattern")),
        ("name", "../up", ("name='../up'", "pattern")),
    ],
)
def test_wrong_settings(name: str, value: Any, named: tuple[str, ...], tmp_path: Path, refused: Refused) -> None:
    content = settings()
    lay_over(content, name, value)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    error = refused("ConfigError", "run", "recipe.yaml")
    assert "recipe.yaml" in error
    for part in named:
        assert part in error
    assert without_run_folder(tmp_path)


CONTRADICTIONS = {
    "minibatch": ({"ppo.minibatch_size": 3}, "ppo.minibatch_size=3 does not divide", "try ppo.minibatch_size=2"),
    "k1 in loss": ({"ppo.kl_in": "loss", "ppo.kl_estimator": "k1"}, "ppo.kl_estimator=k1", "use k2 or k3"),
    "target without KL": ({"ppo.kl_estimator": "none", "ppo.kl_target": 6.0}, "ppo.kl_target=6.0", "remove one"),
    "short horizon": (
        {"ppo.rollout_batch_size": 10, "ppo.kl_target": 6.0, "ppo.kl_horizon": 2},
        "ppo.kl_horizon=2 is too short for 10 sequences",
        "at least 3",
    ),
    "response limits": (
        {"ppo.sampling.min_response_tokens": 7},
        "ppo.sampling.min_response_tokens=7 is above ppo.sampling.max_response_tokens=6",
        "lower it",
    ),
    "one response": (
        {"ppo.advantage_estimator": "rloo"},
        "ppo.samples_per_prompt=1: ppo.advantage_estimator=rloo",
        "set ppo.samples_per_prompt to 2 or more",
    ),
    "warm-up of no critic": (
        {"ppo.advantage_estimator": "remax", "ppo.critic_warmup_steps": 1},
        "ppo.critic_warmup_steps=1: ppo.advantage_estimator=remax",
        "set ppo.critic_warmup_steps=0",
    ),
    "discounted sum": (
        {"ppo.advantage_estimator": "remax", "ppo.discount": 0.9},
        "ppo.discount=0.9: ppo.advantage_estimator=remax",
        "set ppo.discount=1",
    ),
    "no score": ({"ppo.reward.reward_model_coef": 0.0}, "ppo.reward.reward_model_coef=0", "ppo.reward.reward_fn"),
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("case", CONTRADICTIONS)
@pytest.mark.parametrize("way", ["in the file", "on the command line"])
def test_settings_that_contradict_each_other(case: str, way: str, tmp_path: Path, refused: Refused) -> None:
    changes, named, remedy = CONTRADICTIONS[case]
    content, options = settings(), []
    for name, value in changes.items():
        if way == "in the file":
            lay_over(content, name, value)
        else:
            options += [f"--{name.replace('_', '-')}", str(value)]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    error = refused("ConfigError", "run", "recipe.yaml", *options)
    assert named in error
    assert remedy in error
    assert without_run_folder(tmp_path)


def test_every_check_across_settings_is_met_here() -> None:
    """One case per `raise` of `check_ppo` in config_checks.py: a new check needs a case above."""
    from hydra_rlhf import config_checks

    assert config_checks.__file__ is not None
    _, found, checks = Path(config_checks.__file__).read_text().partition("\ndef check_ppo(")
    assert found
    assert checks.count("raise ConfigError") == len(CONTRADICTIONS)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("start", "named"),
    [
        ({"sft": "a", "sft_adapter": "b"}, ("start.sft and start.sft_adapter", "remove one")),
        ({"reward_model": "a"}, ("start.reward_model='a'", "method=hydra-ppo", "remove it or choose another method")),
    ],
)
def test_a_start_the_method_has_no_use_for(start: dict[str, str], named: tuple[str, ...], refused: Refused) -> None:
    write_recipe(Path("recipe.yaml"), start=start)
    error = refused("ConfigError", "run", "recipe.yaml")
    for part in named:
        assert part in error


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("rewards", "is not of the form module:function"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("json:no_such_function", "no_such_function"),
        ("json:decoder", "not a function"),
    ],
)
def test_a_reward_function_that_is_not_there(name: str, named: str, refused: Refused) -> None:
    write_recipe(Path("recipe.yaml"), ppo__reward__reward_fn=name)
    error = refused("ConfigError", "run", "recipe.yaml")
    assert f"ppo.reward.reward_fn='{name}'" in error
    assert named in error


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("source", "named"),
    [
        ({"kind": "function", "function": "no_such_module:f"}, ("reward source 'mine'", "No module named")),
        ({"kind": "function", "function": "no_such_module:f", "isolate": True}, ("isolated", "No module named")),
        (
            {"kind": "http", "url": "https://x/score", "token_env": "NO_SUCH_TOKEN"},
            ("token_env=NO_SUCH_TOKEN", "set it"),
        ),
    ],
)
def test_a_source_that_cannot_be_opened(source: dict[str, Any], named: tuple[str, ...], refused: Refused) -> None:
    write_recipe(Path("recipe.yaml"), ppo__reward__sources=[{"name": "mine", **source}])
    error = refused("ConfigError", "run", "recipe.yaml")
    for part in named:
        assert part in error
    assert not Path("runs").exists()


def test_unknown_options_and_values_on_the_command_line(capfd: pytest.CaptureFixture[str]) -> None:
    """These are reported by the option parser, in its own form: exit code 2, the option named."""
    write_recipe(Path("recipe.yaml"))
    assert exit_code("run", "recipe.yaml", "--ppo.kl-coeff", "0.1") == 2
    error = capfd.readouterr().err
    assert "--ppo.kl-coeff" in error
    assert "--ppo.kl-coef" in error
    assert "Traceback" not in error
    assert exit_code("run", "recipe.yaml", "--ppo.num-steps", "many") == 2
    assert "--ppo.num-steps" in capfd.readouterr().err
    assert exit_code("sample", "runs/x", "--ppo.num-steps", "3") == 2
    assert exit_code("no-such-command") == 2
    assert exit_code("eval", "runs/x", "--num-prompts", "0") == 2
    assert "Traceback" not in capfd.readouterr().err


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_weights")
def test_files_that_are_not_there_or_not_what_they_should_be(tmp_path: Path, refused: Refused) -> None:
    assert "none.yaml cannot be read" in refused("ConfigError", "run", "none.yaml")
    Path("list.yaml").write_text("- a\n- b\n")
    assert "list.yaml holds no settings" in refused("ConfigError", "run", "list.yaml")
    Path("broken.yaml").write_text("name: [unclosed\n")
    assert "broken.yaml cannot be read" in refused("ConfigError", "run", "broken.yaml")
    write_recipe(Path("recipe.yaml"), data__train="my_pairs.jsonl")
    assert "my_pairs.jsonl: there is no such file" in refused("DataError", "run", "recipe.yaml")
    write_recipe(Path("recipe.yaml"), data__train="notes.txt")
    Path("notes.txt").write_text("a\n")
    assert "notes.txt: unknown kind of file" in refused("DataError", "run", "recipe.yaml")
    assert without_run_folder(tmp_path)
    for command in (["eval", "runs/x"], ["sample", "runs/x"], ["report", "runs/x"]):
        assert "runs/x is not a run folder" in refused("CheckpointError", *command)
    assert "runs/x" in refused("CheckpointError", "export", "runs/x", "out", "--format", "peft")
    Path("runs/tiny").mkdir(parents=True)
    Path("runs/tiny/thesis.tex").write_text("mine")
    write_recipe(Path("recipe.yaml"))
    assert "not empty and not a run folder" in refused("CheckpointError", "run", "recipe.yaml")
    assert Path("runs/tiny/thesis.tex").read_text() == "mine"


def row(**changes: Any) -> str:
    return json.dumps(GOOD_ROW | changes)


BAD_ROWS: dict[str, tuple[str | bytes, str]] = {
    "broken JSON": ('{"prompt": "a", "chosen": ', "JSON"),
    "not an object": ('["a", "b"]', "object"),
    "missing field": ('{"prompt": "a", "chosen": "b"}', "rejected"),
    "null": (row(chosen=None), "field 'chosen' is null"),
    "number": (row(rejected=3), "field 'rejected' is a number, not a string"),
    "empty": (row(prompt="  "), "field 'prompt' is empty"),
    "not UTF-8": (b'{"prompt": "gr\xfcn", "chosen": "a", "rejected": "b"}', "UTF-8"),
    "half a surrogate": ('{"prompt": "\\ud83d", "chosen": "a", "rejected": "b"}', "surrogate"),
    "NaN": ('{"prompt": NaN, "chosen": "a", "rejected": "b"}', "prompt"),
    "too large": (row(chosen="x" * 2000), "more than data.max_row_bytes=1000"),
    "unknown role": (row(prompt=[{"role": "boss", "content": "a"}]), "has role 'boss'"),
    "no content": (row(prompt=[{"role": "user"}]), "message 1 of 'prompt'"),
    "assistant last": (row(prompt=[{"role": "assistant", "content": "a"}]), "ends with an assistant message"),
    "no messages": (row(prompt=[]), "empty list of messages"),
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("case", BAD_ROWS)
def test_malformed_rows_stop_the_run_before_any_weight(case: str, tmp_path: Path, refused: Refused) -> None:
    """Line 2 of three: the message names file and line, what is wrong, and how to skip such rows."""
    bad, reason = BAD_ROWS[case]
    raw = bad if isinstance(bad, bytes) else bad.encode()
    content = b"\n".join([row().encode(), raw, row(prompt="who").encode(), b""])
    Path("pairs.jsonl").write_bytes(content)
    write_recipe(Path("recipe.yaml"), data={"train": "pairs.jsonl", "max_row_bytes": 1000})
    error = refused("DataError", "run", "recipe.yaml")
    assert "pairs.jsonl:2: " in error
    assert reason in error
    assert "data.on_bad_row=skip" in error
    assert without_run_folder(tmp_path)
    with gzip.open("pairs.jsonl.gz", "wb") as file:
        file.write(content)
    write_recipe(Path("recipe.yaml"), data={"train": "pairs.jsonl.gz", "max_row_bytes": 1000})
    assert "pairs.jsonl.gz:2: " in refused("DataError", "run", "recipe.yaml")


@pytest.mark.usefixtures("no_weights")
def test_malformed_csv_and_prompt_files(tmp_path: Path, refused: Refused) -> None:
    Path("pairs.csv").write_text("prompt,chosen,rejected\na,b,c\na,b\n")
    write_recipe(Path("recipe.yaml"), data__train="pairs.csv")
    error = refused("DataError", "run", "recipe.yaml")
    assert "pairs.csv:3: has 2 fields, the header has 3" in error
    for setting in ("prompts", "demonstrations"):
        Path("more.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": null, "response": "b"}\n')
        write_recipe(Path("recipe.yaml"), data={"train": "world", "world_pairs": 40, setting: "more.jsonl"})
        assert "more.jsonl:2: field 'prompt' is null" in refused("DataError", "run", "recipe.yaml")
    assert without_run_folder(tmp_path)


@pytest.mark.usefixtures("no_weights")
def test_too_little_data_for_two_splits(refused: Refused) -> None:
    Path("pairs.jsonl").write_text(row() + "\n")
    write_recipe(Path("recipe.yaml"), data__train="pairs.jsonl")
    assert "data.test_frac=0.1" in refused("DataError", "run", "recipe.yaml")


def test_data_check_knows_the_world_and_the_defaults(capfd: pytest.CaptureFixture[str]) -> None:
    assert (
        exit_code("data", "check", "world", "--data.world-pairs", "50", "--data.test-frac", "0.3", "--seed", "4") == 0
    )
    shown = capfd.readouterr().out
    assert "source       world, the built-in one: data.world_pairs=50, 15 of them held out, seed=4" in shown
    assert "rows         50 read -> 50 pairs" in shown
    # `settings` names the defaults, not those of the demo.
    assert exit_code("settings") == 0
    listed = " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert "--data.max-prompt-tokens INT Longer prompts lose tokens on the left (counted). (default: 256)" in listed


@pytest.mark.usefixtures("no_weights")
def test_the_world_holds_out_the_share_that_is_asked_for(refused: Refused) -> None:
    write_recipe(Path("recipe.yaml"), data={"train": "world", "world_pairs": 40, "test_frac": 1.0})
    assert "data.test_frac=1 leaves the training split empty" in refused("ConfigError", "run", "recipe.yaml")
    raw = load_raw(DataConfig(world_pairs=40, test_frac=0.3), seed=0)
    assert (len(raw.train.rows), len(raw.test.rows)) == (28, 12)


def test_data_check_reports_bad_rows_by_its_exit_code(capfd: pytest.CaptureFixture[str]) -> None:
    Path("pairs.jsonl").write_text(f"{row()}\n{row(chosen=None)}\n")
    assert exit_code("data", "check", "pairs.jsonl") == 2
    assert "line 2" in (seen := capfd.readouterr()).out or "pairs.jsonl:2" in seen.out
    assert "Traceback" not in seen.err
    Path("pairs.jsonl").write_text(f"{row()}\n")
    assert exit_code("data", "check", "pairs.jsonl") == 0


# --- models ---------------------------------------------------------------------------------------------------------


def model_folder(folder: Path) -> Path:
    """A whole tiny Llama."""
    save_stage1(folder, tiny_trunk("llama"), tokenizer(), None)
    return folder


class Canary:
    """Unpickled, it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_a_model_that_is_not_there(refused: Refused) -> None:
    write_recipe(Path("recipe.yaml"), model__path="./no/such/folder")
    error = refused("ModelError", "run", "recipe.yaml")
    assert "model.path='./no/such/folder'" in error
    write_recipe(Path("other.yaml"), name="other", model__path="scratch:huge")
    error = refused("ModelError", "run", "other.yaml")
    assert "scratch:huge" in error
    assert "tiny, small" in error


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("setting", ["model.path", "start.sft", "start.hydra_sft"])
def test_pickled_weights_are_never_opened(setting: str, beside: bool, tmp_path: Path, refused: Refused) -> None:
    """`pytorch_model.bin` alone, and beside a safetensors file that holds no model."""
    folder, canary = model_folder(tmp_path / "model"), tmp_path / "canary"
    (folder / "model.safetensors").unlink()
    payload = pickle.dumps(Canary(canary))
    (folder / "pytorch_model.bin").write_bytes(payload)
    if beside:
        (folder / "reward_head.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    content = settings(data__chat_template="none")
    lay_over(content, setting, str(folder))
    Path("recipe.yaml").write_text(yaml.safe_dump(content))
    error = refused("ModelError", "run", "recipe.yaml")
    assert str(folder) in error
    assert "safetensors" in error
    assert not canary.exists()
    pickle.loads(payload)
    assert canary.exists(), "the canary would have been seen"


def test_code_of_a_models_repository_does_not_run_unless_asked(tmp_path: Path, refused: Refused) -> None:
    folder, canary = model_folder(tmp_path / "model"), tmp_path / "canary"
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnModel",
    }
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "trust_remote_code": True}))
    write = f"from pathlib import Path\nPath({str(canary)!r}).touch()\n"
    (folder / "configuration_own.py").write_text(
        f"{write}from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (folder / "modeling_own.py").write_text(
        f"{write}from transformers import LlamaForCausalLM\nclass OwnModel(LlamaForCausalLM):\n    pass\n"
    )
    write_recipe(Path("recipe.yaml"), model__path=str(folder), data__chat_template="none")
    error = refused("ModelError", "run", "recipe.yaml")
    assert f"model.path='{folder}'" in error
    assert "--trust-remote-code" in error
    assert not canary.exists()
    # The plan reads the config: it neither runs the code nor asks on the terminal whether it may.
    assert "--trust-remote-code" in refused("ModelError", "plan", "--model", str(folder))
    assert not canary.exists()
    # A family that transformers has itself is loaded from there, whatever the folder brings along.
    (folder / "config.json").write_text(json.dumps(config | {"trust_remote_code": True}))
    write_recipe(Path("known.yaml"), name="known", model__path=str(folder), data__chat_template="none")
    assert exit_code("run", "known.yaml") == 0
    assert not canary.exists()
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own"}))
    write_recipe(Path("asked.yaml"), name="asked", model__path=str(folder), data__chat_template="none")
    exit_code("hydra-sft", "asked.yaml", "--trust-remote-code")
    assert canary.exists(), "the canary would have been seen"
    # Whatever loads a run's model has the option.
    for words in (["eval", "r"], ["sample", "r"], ["compare", "r"], ["export", "r", "o", "--format", "peft"]):
        assert build_parser().parse_args([*words, "--trust-remote-code"]).trust_remote_code
        assert not build_parser().parse_args(words).trust_remote_code


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_where_there_is_none(device: str, refused: Refused) -> None:
    write_recipe(Path("recipe.yaml"), model__device=device)
    error = refused("ModelError", "run", "recipe.yaml")
    assert f"model.device='{device}'" in error
    assert "use model.device=cpu or auto" in error


def test_a_device_that_is_none(refused: Refused) -> None:
    write_recipe(Path("recipe.yaml"), model__device="gpu")
    assert "model.device='gpu' is not a device; use auto, cpu, cuda or cuda:N" in refused(
        "ModelError", "run", "recipe.yaml"
    )


def test_debug_shows_the_traceback() -> None:
    from hydra_rlhf.errors import ConfigError

    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        exit_code("--debug", "run", "none.yaml")
