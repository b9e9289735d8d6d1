"""Recipes from end to end at smoke size: the five methods, every way to start, settings that change the path."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.tiny import METHODS, tiny_trunk, tokenizer
from safetensors.torch import load_file
from test_code_shape import documented_metrics
from torch.testing import assert_close

from hydra_rlhf.config import ModelConfig
from hydra_rlhf.model.export import load_peft_adapter, save_peft_adapter, save_stage1
from hydra_rlhf.model.load import load_trunk
from hydra_rlhf.model.roles import ROLES, stage1_models
from hydra_rlhf.model.trunk import Trunk
from hydra_rlhf.reporting.render import render_report
from hydra_rlhf.stages.pipeline import run_recipe
from smoke.tiny_runs import keys_of, metric_lines, recipe

OF_PREFERENCE = {"loss/preference", "train/chosen_logprob", "train/rejected_logprob", "eval/preference_loss"}
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPTS = ["where is the cat", "who sat on the mat", "what did the dog do", "did the cat run", "is the mat red"]

REWARD_MODULE = """
def letters(prompts, responses, **columns):
    assert len(prompts) == len(responses)
    return [float(len(set(response))) for response in responses]


def six_each(prompts, responses, **columns):
    return [[0.1 * place for place in range(6)] for _ in responses]


def by_source(prompts, responses, source, **columns):
    return [{"a": 2.0, "b": 3.0}[name] for name in source]
"""


def run(folder: Path, **changes: Any) -> Path:
    """Run the tiny recipe with changes to the end, and check what every run must leave behind."""
    done = run_recipe(recipe(folder, **changes))
    documented = documented_metrics()
    assert keys_of(done) <= documented, keys_of(done) - documented
    stages = json.loads((done / "stages.json").read_text())
    assert all(stage["done"] for stage in stages.values())
    assert list(stages)[-2:] == ["ppo", "evaluation"]
    summary = json.loads((done / "summary.json").read_text())
    assert math.isfinite(summary["score_mean"])
    assert math.isfinite(summary["kl"])
    for line in metric_lines(done):
        assert line.get("optim/skipped_steps", 0) == 0
    assert render_report(done).is_file()
    return done


def ppo_lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in metric_lines(folder) if line["stage"] == "ppo"]


def logits(trunk: Trunk, adapter: str | None) -> torch.Tensor:
    tokens = torch.arange(3, 11)[None]
    with torch.no_grad():
        hidden = trunk.hidden_states(tokens, torch.ones_like(tokens, dtype=torch.bool), adapter=adapter)
        return trunk.lm_head.logits(hidden[0])


@pytest.fixture(scope="session")
def hydra_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose stage 1 other tests start from; it logs every metric that PPO and Hydra-SFT have."""
    folder = tmp_path_factory.mktemp("hydra")
    return run(folder, ppo__kl_in="loss", ppo__kl_estimator="k3", ppo__entropy_coef=0.01)


@pytest.fixture(scope="session")
def separate_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an SFT model and a reward model of its own."""
    return run(tmp_path_factory.mktemp("separate"), method="d-lora-ppo", memory__track_tensors=True)


@pytest.fixture
def reward_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of reward functions that can be imported; its name differs between tests."""
    name = f"rewards_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(REWARD_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on the disk, with a chat template."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    words = tokenizer()
    words.chat_template = CHAT_TEMPLATE
    save_stage1(folder, tiny_trunk("llama"), words, None)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_from_data_to_report(method: str, tmp_path: Path) -> None:
    folder = run(tmp_path, method=method)
    assert [line["stage"] for line in metric_lines(folder) if line["step"] == 1][:-1] == list(
        stage1_models(ROLES[method])
    )
    lines = ppo_lines(folder)
    assert [line["step"] for line in lines] == [1, 2]
    assert {"eval/score", "eval/gold"} <= lines[1].keys() - lines[0].keys()
    # The actor learns: it leaves the reference after the first step and not before.
    assert lines[0]["kl/reference"] == pytest.approx(0.0, abs=1e-4)
    assert abs(lines[1]["kl/reference"]) > 1e-3
    separate = method in ("ppo", "lora-ppo", "d-lora-ppo")
    assert (folder / "sft" / "model.safetensors").is_file() == separate
    assert (folder / "hydra_sft" / "reward_head.safetensors").is_file() == (not separate)
    whole = method == "ppo"
    assert (folder / "ppo" / "actor" / "model.safetensors").is_file() == whole
    assert (folder / "ppo" / "actor" / "adapter_model.safetensors").is_file() == (not whole)
    assert (folder / "ppo" / "critic").is_dir() == (method != "j-hydra-ppo")
    assert set(load_file(folder / "ppo" / "value_head.safetensors")) == {"weight", "bias"}
    counted = json.loads((folder / "memory.json").read_text())["methods"]
    assert set(counted) == set(ROLES)


def test_kept_samples_have_their_tokens(hydra_run: Path) -> None:
    samples = [json.loads(line) for line in (hydra_run / "samples.jsonl").read_text().splitlines()]
    numbers = {
        "rollout": {"logprob", "kl", "value", "advantage", "reward", "change"},
        "held_out": {"logprob", "kl", "value"},
        "evaluation": {"logprob", "kl", "value"},
    }
    assert {sample["kind"] for sample in samples} == set(numbers)
    for sample in samples:
        for side in ("", "reference_") if sample["kind"] == "evaluation" else ("",):
            tokens = sample[f"{side}tokens"]
            assert "".join(tokens["pieces"]) == sample[f"{side}response"]
            assert set(tokens) - {"ids", "pieces", "names"} == numbers[sample["kind"]]
            assert {len(entry) for name, entry in tokens.items() if name != "names"} == {len(tokens["ids"])}
        assert sum(sample["tokens"]["kl"]) == pytest.approx(sample["kl"], abs=1e-3)
    # What the update did: in the first step the actor is the reference, so `change` is all there is between them then.
    assert any(change for sample in samples if sample["kind"] == "rollout" for change in sample["tokens"]["change"])


def test_the_logged_metrics_are_the_documented_ones(hydra_run: Path, separate_run: Path) -> None:
    """Every run of this file logs documented keys only (see `run`); these two log all of them but CUDA's, that of a
    single pass, which their two epochs have not (`tests/contract/test_one_pass.py` has it), that of groups
    (`test_estimators_run.py`) and those of preference training (`test_preference_runs.py`)."""
    elsewhere = {"rollout/logprob_gap", "score/flat_group_frac", *OF_PREFERENCE}
    documented = {key for key in documented_metrics() if not key.startswith("memory/cuda_")} - elsewhere
    assert keys_of(hydra_run) | keys_of(separate_run) == documented
    assert {line["stage"] for folder in (hydra_run, separate_run) for line in metric_lines(folder)} == {
        "sft",
        "reward_model",
        "hydra_sft",
        "ppo",
        "evaluation",
    }


def test_a_reward_function_alone_needs_no_reward_model(reward_module: str, tmp_path: Path) -> None:
    folder = run(tmp_path, ppo__reward__reward_fn=f"{reward_module}:letters", ppo__reward__reward_model_coef=0.0)
    stages = [line["stage"] for line in metric_lines(folder)]
    assert set(stages) == {"sft", "ppo", "evaluation"}
    for line in (json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()):
        assert line["score"] == len(set(line["response"]))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["reward_accuracy"] is None


def test_per_token_rewards_are_added_to_the_reward_head(reward_module: str, hydra_run: Path, tmp_path: Path) -> None:
    """Six tokens each, worth 0 + 0.1 + ... + 0.5 = 1.5, twice: a score 3.0 above the reward head's alone."""
    same = {
        "start__hydra_sft": str(hydra_run / "hydra_sft"),
        "ppo__sampling": {"min_response_tokens": 6, "max_response_tokens": 6},
        "ppo__samples_per_prompt": 2,
        "ppo__num_logged_samples": 8,
        "ppo__num_steps": 1,
    }
    plain = run(tmp_path, name="plain", **same)
    added = run(
        tmp_path, name="added", ppo__reward={"reward_fn": f"{reward_module}:six_each", "reward_fn_coef": 2.0}, **same
    )
    before, after = ppo_lines(plain)[0], ppo_lines(added)[0]
    assert after["score/mean"] - before["score/mean"] == pytest.approx(3.0, abs=1e-4)
    assert after["reward/mean"] - before["reward/mean"] == pytest.approx(3.0, abs=1e-4)
    # Four prompts with two responses each, which differ: every (prompt, sample) has random numbers of its own.
    samples = [json.loads(line) for line in (plain / "samples.jsonl").read_text().splitlines()]
    rollout = [line for line in samples if line["kind"] == "rollout"]
    assert len(rollout) == 8
    by_prompt = [
        {line["response"] for line in rollout if line["prompt_index"] == prompt}
        for prompt in {line["prompt_index"] for line in rollout}
    ]
    assert len(by_prompt) == 4
    assert all(len(responses) == 2 for responses in by_prompt)


def test_finished_stage_1_models_are_not_trained_again(separate_run: Path, hydra_run: Path, tmp_path: Path) -> None:
    separate = run(
        tmp_path,
        name="separate",
        method="lora-ppo",
        start__sft=str(separate_run / "sft"),
        start__reward_model=str(separate_run / "reward_model"),
    )
    assert {line["stage"] for line in metric_lines(separate)} == {"ppo", "evaluation"}
    # d-lora-ppo is the same mathematics on two trunks instead of four.
    for here, there in zip(ppo_lines(separate), ppo_lines(separate_run), strict=True):
        assert here["score/mean"] == pytest.approx(there["score/mean"], abs=1e-4)
    joint = run(tmp_path, name="joint", method="j-hydra-ppo", start__hydra_sft=str(hydra_run / "hydra_sft"))
    assert {line["stage"] for line in metric_lines(joint)} == {"ppo", "evaluation"}
    # The first rollout is the stage-1 model's, whatever method comes after it.
    assert ppo_lines(joint)[0]["score/mean"] == ppo_lines(hydra_run)[0]["score/mean"]


def test_start_sft_goes_through_the_rest_of_stage_1(separate_run: Path, tmp_path: Path) -> None:
    folder = run(tmp_path, start__sft=str(separate_run / "sft"))
    assert {line["stage"] for line in metric_lines(folder)} == {"hydra_sft", "ppo", "evaluation"}
    first = next(line for line in metric_lines(folder) if line["stage"] == "hydra_sft")
    from_nothing = next(line for line in metric_lines(separate_run) if line["stage"] == "sft")
    assert first["loss/sft"] < from_nothing["loss/sft"] - 0.1


def test_a_peft_adapter_becomes_the_sft_model(llama: Path, tmp_path: Path) -> None:
    base = load_trunk(str(llama), ModelConfig())
    base.add_adapter("a", rank=2, alpha=4.0, targets=("all-linear",), dtype=torch.float32, seed_of=lambda _: 1)
    for linear in base.lora_linears.values():
        torch.nn.init.normal_(linear.lora_B["a"], 0.0, 0.3, generator=torch.Generator().manual_seed(0))
    save_peft_adapter(base, "a", tmp_path / "adapter")
    folder = run(
        tmp_path,
        model__path=str(llama),
        start__sft_adapter=str(tmp_path / "adapter"),
        data__chat_template="none",
    )
    merged = load_trunk(str(folder / "sft"), ModelConfig())
    load_peft_adapter(fresh := load_trunk(str(llama), ModelConfig()), "a", tmp_path / "adapter")
    assert_close(logits(merged, None), logits(fresh, "a"), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(merged, None), logits(fresh, None), atol=1e-2)
    assert {line["stage"] for line in metric_lines(folder)} == {"hydra_sft", "ppo", "evaluation"}


def test_lora_in_stage_1_on_a_bfloat16_base_with_checkpointing(llama: Path, tmp_path: Path) -> None:
    folder = run(
        tmp_path,
        model={"path": str(llama), "dtype": "bfloat16", "device": "cpu"},
        memory__checkpointing="layers",
        hydra_sft__tuning="lora",
        data__chat_template="none",
    )
    base, trained = load_file(llama / "model.safetensors"), load_file(folder / "hydra_sft" / "model.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {torch.bfloat16}
    changed = {name for name in base if not torch.equal(base[name].bfloat16(), trained[name])}
    assert changed
    assert all("_proj" in name for name in changed), "LoRA on linears leaves embeddings, norms and head alone"
    assert {tensor.dtype for tensor in load_file(folder / "ppo/actor/adapter_model.safetensors").values()} == {
        torch.float32
    }


def test_checkpointing_changes_no_number(hydra_run: Path, tmp_path: Path) -> None:
    start = {"start__hydra_sft": str(hydra_run / "hydra_sft")}
    plain = run(tmp_path, name="plain", memory__checkpointing="none", **start)
    recomputed = run(tmp_path, name="recomputed", memory__checkpointing="layers", **start)
    for key in ("loss/policy", "loss/value", "optim/actor_grad_norm", "optim/critic_grad_norm", "score/mean"):
        for a, b in zip(ppo_lines(plain), ppo_lines(recomputed), strict=True):
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-7), key


def test_conversations_with_the_tokenizers_own_template(reward_module: str, llama: Path, tmp_path: Path) -> None:
    """Messages in, the template's text before the model; further columns reach the reward function."""
    rows = [
        {
            "prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": f"{text} {number}"}],
            "chosen": [{"role": "assistant", "content": "the cat sat on the mat"}],
            "rejected": [{"role": "assistant", "content": f"the dog ran {number}"}],
            "source": "ab"[number % 2],
        }
        for number in range(6)
        for text in PROMPTS
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = run(
        tmp_path,
        model__path=str(llama),
        data={"train": str(file), "test_frac": 0.3, "max_prompt_tokens": 48, "max_response_tokens": 24},
        ppo__reward={"reward_fn": f"{reward_module}:by_source", "reward_model_coef": 0.0},
        ppo__num_logged_samples=4,
    )
    assert json.loads((folder / "chat.json").read_text()) == {"template": "tokenizer"}
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert samples
    for sample in samples:
        assert sample["prompt"].startswith("<system>be brief<user>")
        assert sample["prompt"].endswith("<assistant>")
        number = int(sample["prompt"].removesuffix("<assistant>").split()[-1])
        assert sample["score"] == [2.0, 3.0][number % 2]
    assert "eval/gold" not in keys_of(folder)
    data = json.loads((folder / "data.json").read_text())
    assert data["train"]["rows_used"] + data["test"]["rows_used"] == len(rows)


def test_critic_warm_up_adaptive_kl_and_early_stop(hydra_run: Path, tmp_path: Path) -> None:
    folder = run(
        tmp_path,
        start__hydra_sft=str(hydra_run / "hydra_sft"),
        ppo__num_steps=4,
        ppo__critic_warmup_steps=1,
        ppo__kl_target=0.001,
        ppo__kl_horizon=50,
        ppo__max_update_kl=1e-6,
        ppo__reward={"clip": 0.5, "normalize": True, "missing_eos_penalty": 1.0},
    )
    lines = ppo_lines(folder)
    # Step 1 trains the critic alone, so the actor is still the reference in the rollout of step 2.
    assert "loss/policy" not in lines[0]
    assert "loss/value" in lines[0]
    assert lines[0]["ppo/update_frac"] == 1
    assert lines[1]["kl/reference"] == pytest.approx(0.0, abs=1e-4)
    # From step 2 on the actor learns, and its second minibatch is beyond the limit: 1 of 4 minibatches is done.
    assert lines[1]["ppo/update_frac"] == 0.25
    assert abs(lines[2]["kl/reference"]) > 1e-3
    assert len({line["kl/coef"] for line in lines}) > 2, "the coefficient should move"
