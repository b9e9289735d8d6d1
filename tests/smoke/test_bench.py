"""`hydra-rlhf bench` for real, on a tiny shape and on a tiny model with real prompts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from contract.tiny import tiny_trunk, tokenizer

from hydra_rlhf.benchmark import bench, machine, measure
from hydra_rlhf.model.export import save_stage1
from hydra_rlhf.model.roles import methods_with
from smoke.tiny_runs import exit_code

SIZES = ("--batch", "2", "--prompt-tokens", "4", "--response-tokens", "3", "--rank", "2")
TINY = ("--shape", "scratch:tiny", "--device", "cpu", *SIZES)


@pytest.fixture(autouse=True)
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates are measured on little, since no number of these tests depends on them."""

    def measured(device: Any, dtype: Any) -> machine.Machine:
        return machine.measure_machine(device, dtype, array_bytes=2**20, matrix_size=64, seconds=0.001)

    monkeypatch.setattr(bench, "this_machine", measured)


@pytest.fixture
def found(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run the command and read what it wrote."""

    def run(*argv: str) -> dict[str, Any]:
        file = tmp_path / "bench.json"
        assert exit_code("bench", *argv, "--json", str(file)) == 0
        return json.loads(file.read_text())

    return run


def test_methods_measured_planned_and_drawn(
    found: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "bench.svg"
    # 456 MiB leave 8 MiB for tensors: too little for four trunks.
    methods = ("--method", "lora-ppo", "--method", "hydra-ppo")
    budget = ("--budget", "456MiB", "--max-batch", "3", "--micro-batch", "1", "--iterations", "1")
    result = found(*TINY, *methods, *budget, "--picture", str(picture))
    for rows in (result["equal_batch"], result["equal_budget"]):
        assert [row["method"] for row in rows] == ["lora-ppo", "hydra-ppo"]
        for row in rows:
            is_measured = row["status"] == "measured"
            assert is_measured is (row["method"] != "lora-ppo")
            assert (row["time"] is not None) is is_measured
            assert (row["measured_bytes"] is not None) is is_measured
            assert row["planned_bytes"] == max(sum(parts.values()) for parts in row["planned_phases"].values())
            assert (row["planned_bytes"] <= 8 * 2**20) is is_measured
    for row in result["equal_batch"][1:]:
        assert row["measured_bytes"] == pytest.approx(row["planned_bytes"], rel=0.1)
        assert (row["prompt_tokens"], row["response_tokens"]) == (4.0, 3.0)
        parts = [row["time"][phase] for phase in ("generate_s", "score_s", "update_s")]
        assert 0 < sum(parts) <= row["time"]["s_per_sample"] * 1.001
        assert len(row["steps"]) == 1
    # A batch of 3 fits, and nothing larger is tried.
    assert [(row["batch"], row["batch_is_capped"]) for row in result["equal_budget"][1:]] == [(3, True)]
    text = capsys.readouterr().out
    assert text.count("planned  ") >= 2
    assert "Equal memory" in text
    drawn = picture.read_text()
    assert drawn.count("planned, no time") == 2
    assert "planned, not measured" in drawn


def test_the_methods_with_ppo_by_default(found: Callable[..., dict[str, Any]]) -> None:
    rows = found(*TINY, "--compare", "batch", "--micro-batch", "2", "--iterations", "1", "--time-only")["equal_batch"]
    assert [(row["method"], row["status"]) for row in rows] == [(method, "measured") for method in methods_with("ppo")]


def test_exactly_as_many_steps_as_asked_for(
    found: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    train = measure.train_ppo_stage

    def counted(session: Any, model: Any, chat: Any, prompts: Any, config: Any, **rest: Any) -> Any:
        asked.append(config.num_steps)
        return train(session, model, chat, prompts, config, **rest)

    monkeypatch.setattr(measure, "train_ppo_stage", counted)
    result = found(*TINY, "--method", "hydra-ppo", "--iterations", "2", "--time-only", "--checkpointing", "layers")
    assert asked == [2]
    (row,) = result["equal_batch"]
    assert result["equal_budget"] == []
    assert row["measured_bytes"] is None
    assert row["checkpointed_layers"] == 4
    found(*TINY, "--method", "hydra-ppo", "--iterations", "2", "--micro-batch", "1")
    assert asked == [2, 3]  # one more, in which every tensor is counted


def test_a_model_folder_with_real_prompts_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_stage1(tmp_path / "model", tiny_trunk("llama"), tokenizer(), None)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "the cat " * n}) + "\n" for n in (1, 2, 6)))
    sizes = (
        "--batch",
        "3",
        "--prompt-tokens",
        "5",
        "--response-tokens",
        "2",
        "--micro-batch",
        "2",
        "--iterations",
        "1",
    )
    words = ("--model", str(tmp_path / "model"), "--prompts", str(prompts), *sizes, "--device", "cpu", "--time-only")
    adapters = ("--method", "lora-ppo", "--targets", "q_proj", "v_proj", "--dtype", "bfloat16")
    assert exit_code("bench", *words, *adapters, "--json", "-") == 0
    result = json.loads(capsys.readouterr().out)  # and nothing else
    (row,) = result["equal_batch"]
    assert row["micro_batch_tokens"] == 2 * (5 + 2)
    assert 2 < row["prompt_tokens"] < 5  # the longest of three different ones is cut to five
    assert result["dtype"] == "bfloat16"
    assert result["lora"]["targets"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "grpo"], "there is no such method"),
        (["--picture", "bench.pdf"], "ends in .svg or .png"),
        (["--prompts", "prompts.jsonl"], "needs a tokenizer"),
        (["--shape", "llama-70b"], "shape:llama-2-7b"),
        (["--ppo.minibatch-size", "1"], "--batch alone"),
        (["--dtype", "float8"], "model.dtype"),
        (["--budget", "much"], "not a number of bytes"),
    ],
)
def test_bad_input_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("bench", *TINY, *words) == 2
    assert message in capsys.readouterr().err


def test_memory_that_runs_out_is_said_and_the_other_methods_are_measured(
    found: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hydra_rlhf.errors import OutOfMemoryError

    build = measure.build_model

    def refused(recipe: Any) -> Any:
        if recipe.method == "hydra-ppo":
            raise OutOfMemoryError("memory ran out\nsomewhere")
        return build(recipe)

    monkeypatch.setattr(measure, "build_model", refused)
    methods = ("--method", "hydra-ppo", "--method", "j-hydra-ppo", "--compare", "batch", "--iterations", "1")
    rows = found(*TINY, *methods, "--time-only")["equal_batch"]
    assert [row["status"] for row in rows] == ["out-of-memory", "measured"]
    assert rows[0]["error"] == "memory ran out"
    assert rows[0]["time"] is None
    assert "no memory" in capsys.readouterr().out
