"""Recipes on packed weights from end to end: what stage 1 leaves, what PPO leaves, every start, what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.tiny import tiny_trunk, tokenizer
from safetensors.torch import load_file
from torch.testing import assert_close

from hydra_rlhf.config import ModelConfig
from hydra_rlhf.errors import ConfigError, HydraError, ModelError
from hydra_rlhf.model.export import load_peft_adapter, save_peft_adapter, save_stage1
from hydra_rlhf.model.load import load_trunk
from hydra_rlhf.stages.finished import export_run, sample_side_by_side
from hydra_rlhf.stages.pipeline import run_recipe
from smoke.test_methods_run import logits, ppo_lines, run
from smoke.tiny_runs import metric_lines, recipe

LORA_STAGE1 = {"batch_size": 32, "learning_rate": 1e-2, "tuning": "lora", "eval_every": 2, "max_eval_rows": 4}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on the disk."""
    folder = tmp_path_factory.mktemp("quantized") / "llama"
    save_stage1(folder, tiny_trunk("llama"), tokenizer(), None)
    return folder


def settings(base: Path, format: str, **changes: Any) -> dict[str, Any]:
    """Changes to the tiny recipe that pack `base`."""
    packed = {
        "model": {"path": str(base), "device": "cpu", "quantization": format},
        "data__chat_template": "none",
        **dict.fromkeys(("sft", "reward_model", "hydra_sft"), LORA_STAGE1),
    }
    return packed | changes


@pytest.fixture(scope="session")
def nf4_run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished hydra-ppo on NF4, all of it learned with 8-bit moments."""
    folder = tmp_path_factory.mktemp("nf4")
    eight = {"hydra_sft": LORA_STAGE1 | {"optimizer": "adamw-8bit"}, "ppo__optimizer": "adamw-8bit"}
    return run(folder, **settings(base, "nf4", **eight))


def test_a_hydra_on_nf4_runs_from_data_to_report(nf4_run: Path, base: Path) -> None:
    left = nf4_run / "hydra_sft"
    assert json.loads((left / "quantized_base.json").read_text()) == {
        "path": str(base),
        "revision": None,
        "commit": None,
        "quantization": "nf4",
        "dtype": "float32",
        "adapter": "adapter",
    }
    assert not (left / "model.safetensors").exists()
    learned = load_file(left / "adapter" / "adapter_model.safetensors")
    assert all(tensor.abs().sum() > 0 for tensor in learned.values())
    lines = ppo_lines(nf4_run)
    assert lines[0]["kl/reference"] == pytest.approx(0.0, abs=1e-4)
    assert abs(lines[1]["kl/reference"]) > 1e-3
    # Stage 1's set and the actor's in one: rank 2 + 2.
    assert json.loads((nf4_run / "ppo/actor/adapter_config.json").read_text())["r"] == 4


def test_a_finished_run_is_sampled_and_exported(nf4_run: Path, tmp_path: Path) -> None:
    rows = sample_side_by_side(nf4_run, prompts=["the cat"], num_prompts=1, checkpoint="last", seed=0)
    assert rows[0]["prompt"] == "the cat"
    for format in ("merged", "peft", "reward-model"):
        export_run(nf4_run, tmp_path / format, format=format, checkpoint="last")
    packed = load_trunk(str(nf4_run / "hydra_sft"), ModelConfig(quantization="nf4", device="cpu"))
    plain = load_trunk(packed.quantized.path, ModelConfig(device="cpu"))
    merged = load_trunk(str(tmp_path / "merged"), ModelConfig(device="cpu"))
    # The exported policy is the actor on the packed base: neither what stage 1 left, nor the adapter on the full base.
    packed.switch.below = ()
    load_peft_adapter(packed, "exported", tmp_path / "peft")
    assert_close(logits(merged, None), logits(packed, "exported"), atol=1e-3, rtol=1e-3)
    load_peft_adapter(plain, "exported", tmp_path / "peft")
    assert not torch.allclose(logits(merged, None), logits(plain, "exported"), atol=1e-2)


def test_a_reward_model_starts_from_the_sft_models_set(base: Path, tmp_path: Path) -> None:
    """One optimizer step at a rate of nothing: what the reward model's folder holds is where it started."""
    still = LORA_STAGE1 | {"learning_rate": 1e-30, "num_epochs": 0.01}
    folder = run(tmp_path, **settings(base, "int8", method="d-lora-ppo", reward_model=still))
    sft = load_file(folder / "sft/adapter/adapter_model.safetensors")
    reward = load_file(folder / "reward_model/adapter/adapter_model.safetensors")
    assert sft.keys() == reward.keys()
    assert all(torch.equal(sft[name], reward[name]) for name in sft)
    assert any(tensor.abs().sum() > 0 for name, tensor in sft.items() if "lora_B" in name)
    assert not (folder / "sft" / "reward_head.safetensors").exists()
    assert (folder / "reward_model" / "reward_head.safetensors").is_file()
    for stage in ("sft", "reward_model"):
        assert json.loads((folder / stage / "quantized_base.json").read_text())["path"] == str(base)


def test_a_finished_stage_1_is_not_trained_again(nf4_run: Path, base: Path, tmp_path: Path) -> None:
    start = str(nf4_run / "hydra_sft")
    joint = run(tmp_path, **settings(base, "nf4", method="j-hydra-ppo", start__hydra_sft=start))
    assert {line["stage"] for line in metric_lines(joint)} == {"ppo", "evaluation"}
    assert ppo_lines(joint)[0]["score/mean"] == ppo_lines(nf4_run)[0]["score/mean"]


def test_a_peft_adapter_becomes_the_set_below(base: Path, tmp_path: Path) -> None:
    trunk = load_trunk(str(base), ModelConfig(device="cpu"))
    trunk.add_adapter("a", rank=3, alpha=6.0, targets=("all-linear",), dtype=torch.float32, seed_of=lambda _: 1)
    for linear in trunk.lora_linears.values():
        torch.nn.init.normal_(linear.lora_B["a"], 0.0, 0.3, generator=torch.Generator().manual_seed(0))
    save_peft_adapter(trunk, "a", tmp_path / "adapter")
    folder = run(tmp_path, **settings(base, "int8", start__sft_adapter=str(tmp_path / "adapter")))
    given = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    kept = load_file(folder / "sft/adapter/adapter_model.safetensors")
    trained = load_file(folder / "hydra_sft/adapter/adapter_model.safetensors")
    assert given.keys() == kept.keys() == trained.keys()
    assert all(torch.equal(given[name], kept[name]) for name in given)
    assert not any(torch.equal(given[name], trained[name]) for name in given)
    # Its rank is 3, that of the recipe's own sets 2: there are one of the former and two of the latter.
    each = sum(tensor.numel() for tensor in given.values()) // 3 * 4
    memory = json.loads((folder / "memory.json").read_text())
    assert memory["methods"]["hydra-ppo"]["adapters"] == (3 + 2 * 2) * each
    heads = memory["methods"]["hydra-ppo"]["heads"]
    assert memory["decisions"]["ppo"]["phases"]["update"]["adapters"] == (3 + 2 * 2) * each + heads
    assert memory["decisions"]["hydra_sft"]["phases"]["hydra_sft"]["adapters"] == 3 * each + heads // 2


def test_a_full_precision_start_is_packed(base: Path, tmp_path: Path) -> None:
    """An SFT start in full precision is the base of what is trained on it, whatever `model.path` says."""
    folder = run(tmp_path, **settings(base, "int8", start__sft=str(base), model__path="scratch:tiny"))
    assert json.loads((folder / "hydra_sft/quantized_base.json").read_text())["path"] == str(base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__path": "scratch:tiny"}, r"model.quantization=nf4 packs the weights of a trained model.*scratch:tiny"),
        ({"method": "ppo"}, r"model.quantization=nf4.*method=ppo trains the whole of its actor and critic"),
        ({"hydra_sft__tuning": "full"}, r"model.quantization=nf4.*use hydra_sft.tuning=lora"),
        ({"method": "lora-ppo"}, r"use sft.tuning=lora and reward_model.tuning=lora"),
    ],
)
def test_what_packed_weights_cannot_do_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    packed = {"model__path": "no/model", "model__quantization": "nf4", "hydra_sft__tuning": "lora"}
    with pytest.raises(ConfigError, match=message):
        run_recipe(recipe(tmp_path, **(packed | changes)))
    assert not (tmp_path / "tiny").exists(), "nothing is begun"


def test_a_start_for_another_base_is_refused(nf4_run: Path, tmp_path: Path) -> None:
    start = {"start__hydra_sft": str(nf4_run / "hydra_sft")}
    with pytest.raises(ModelError, match=r"holds an adapter for .*llama, not for model.path=other/model"):
        run_recipe(recipe(tmp_path, model={"path": "other/model", "quantization": "nf4"}, **start))
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"ppo__optimizer": "adamw-8bit"}, "ppo.optimizer=adamw-8bit"),
        ({"hydra_sft__optimizer": "adamw-8bit"}, "hydra_sft.optimizer=adamw-8bit"),
        ({"model__path": "a/b", "model__quantization": "nf4", "hydra_sft__tuning": "lora"}, "model.quantization=nf4"),
    ],
)
def test_a_missing_library_is_named_before_anything_is_begun(
    changes: dict, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(HydraError, match=rf"{setting} needs bitsandbytes: pip install 'hydra-rlhf\[quant\]'"):
        run_recipe(recipe(tmp_path, **changes))
    assert not (tmp_path / "tiny").exists()
