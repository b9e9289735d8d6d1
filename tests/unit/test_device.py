"""Which dtype a base gets where the settings leave it to the machine, and that a run keeps it on another one."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hydra_rlhf.config import ModelConfig, Recipe
from hydra_rlhf.errors import ModelError
from hydra_rlhf.model import device
from hydra_rlhf.model.device import has_bfloat16_units as ask_the_machine  # the tests' own answer is put in its place
from hydra_rlhf.stages.pipeline import with_settled_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch):
    """Sets what machines say: {device type: has units}."""

    def set_answer(**units: bool) -> None:
        monkeypatch.setattr(device, "has_bfloat16_units", lambda asked: units[asked.type])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in units)

    return set_answer


@pytest.mark.parametrize(
    ("units", "settings", "expected"),
    [
        ({"cpu": True}, {}, ("bfloat16", "auto: this CPU has units for it")),
        ({"cpu": False}, {}, ("float32", "auto: this CPU has no units for bfloat16")),
        ({"cpu": False, "cuda": True}, {}, ("bfloat16", "auto: this CUDA has units for it")),
        ({"cpu": True, "cuda": False}, {}, ("float32", "auto: this CUDA has no units for bfloat16")),
        ({"cpu": True, "cuda": False}, {"device": "cpu"}, ("bfloat16", "auto: this CPU has units for it")),
        ({"cpu": False}, {"dtype": "bfloat16"}, ("bfloat16", "as set")),
        ({"cpu": True}, {"dtype": "float32"}, ("float32", "as set")),
        (
            {"cpu": True},
            {"path": "scratch:tiny"},
            ("float32", "auto: a small model that begins with random weights"),
        ),
        ({"cpu": False}, {"path": "scratch:tiny", "dtype": "bfloat16"}, ("bfloat16", "as set")),
    ],
)
def test_auto_follows_the_device(answer, units: dict[str, bool], settings: dict[str, Any], expected: tuple[str, str]):
    answer(**units)
    config = ModelConfig(**({"path": "some/model"} | settings))
    assert device.choose_dtype(config) == expected
    assert device.with_dtype(config).dtype == expected[0]
    assert str(device.dtype_of(config)) == f"torch.{expected[0]}"


def test_a_device_that_is_not_there(answer):
    answer(cpu=True)
    with pytest.raises(ModelError, match="no CUDA device"):
        device.choose_dtype(ModelConfig(path="some/model", device="cuda"))


def test_what_a_machine_says(monkeypatch: pytest.MonkeyPatch):
    assert ask_the_machine(CPU) in (True, False)  # in this version of torch, whatever the machine
    for avx512, amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: avx512)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert ask_the_machine(CPU) == (avx512 or amx)
    # A GPU before Ampere computes bfloat16 by way of float32, and torch calls that supported unless it is asked well.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not ask_the_machine(CUDA)


@pytest.mark.parametrize(("begun_with", "now_has"), [("bfloat16", False), ("float32", True)])
def test_a_run_keeps_its_dtype_on_another_machine(answer, tmp_path: Path, begun_with: str, now_has: bool):
    answer(cpu=now_has)
    suits_here = "bfloat16" if now_has else "float32"

    def recipe(**model: Any) -> Recipe:
        return Recipe(name="run", output_dir=str(tmp_path), model=ModelConfig(**({"path": "some/model"} | model)))

    assert with_settled_dtype(recipe()).model.dtype == suits_here
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(asdict(recipe(dtype=begun_with))))
    assert with_settled_dtype(recipe()).model.dtype == begun_with
    # What is named is named, and another model is another run.
    assert with_settled_dtype(recipe(dtype=suits_here)).model.dtype == suits_here
    assert with_settled_dtype(recipe(path="other/model")).model.dtype == suits_here


def test_a_call_costs_more_where_kernels_are_launched():
    assert device.call_tokens(torch.device("cpu")) == device.CPU_CALL_TOKENS
    assert device.call_tokens(torch.device("cuda:1")) == device.CALL_TOKENS > device.CPU_CALL_TOKENS
