"""Every `hydra-rlhf` command of the README, and its Python block, run for real on a tiny model and a few rows."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract.tiny import tiny_trunk, tokenizer
from test_documents import readme_commands
from torch.testing import assert_close

from hydra_rlhf.model.export import save_stage1
from smoke.tiny_runs import ROOT, command, environment, exit_code

MODEL = "path-or-hub-name"
PAIRS = "my_pairs.jsonl"
SMALLER = {
    "recipes/quick.yaml": ["--data.world-pairs", "60", "--ppo.num-steps", "2"],
    "recipes/own-data.yaml": [
        *("--ppo.num-steps", "1", "--ppo.rollout-batch-size", "4", "--ppo.minibatch-size", "2"),
        *("--ppo.sampling.max-response-tokens", "6", "--ppo.num-eval-prompts", "2"),
    ],
}
"""What is added to `hydra-rlhf run RECIPE`, besides the settings of `EVERYWHERE`."""
SMALLER_BENCH = [
    *(
        "--shape",
        "scratch:tiny",
        "--batch",
        "2",
        "--prompt-tokens",
        "4",
        "--response-tokens",
        "3",
        "--micro-batch",
        "2",
    ),
    *("--iterations", "1", "--max-batch", "2", "--device", "cpu", "--time-only"),
]
"""What is added to `hydra-rlhf bench`; the last word on an option holds."""
EVERYWHERE = ["--runtime.num-threads", "1", "--model.device", "cpu", "--evaluation.num-prompts", "2"]
COMMANDS = [words[1:] for words in readme_commands() if words[0] == "hydra-rlhf"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of a reader of the README: recipes, a data file, a model."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    rows = [
        {"prompt": f"where is cat {number}", "chosen": "on the mat", "rejected": f"the dog ran {number}"}
        for number in range(40)
    ]
    (folder / PAIRS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_stage1(folder / MODEL, tiny_trunk("llama"), tokenizer(), None)
    return folder


@pytest.fixture(scope="module")
def outputs(workplace: Path) -> dict[str, str]:
    """What each command of the README printed, by the command; all of them were run in order and ended with 0."""
    printed: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch, pytest.MonkeyPatch.context() as out:
        patch.chdir(workplace)
        for words in COMMANDS:
            more = {"run": SMALLER.get(words[1], []) + EVERYWHERE, "bench": SMALLER_BENCH}.get(words[0], [])
            text: list[str] = []
            out.setattr(sys.stdout, "write", text.append)
            assert exit_code(*words, *more) == 0, words
            out.undo()
            printed[" ".join(words)] = "".join(text)
    return printed


def test_there_are_commands_for_every_kind_of_use() -> None:
    kinds = {"data", "run", "sample", "chat", "eval", "compare", "report", "export", "plan", "bench"}
    assert {words[0] for words in COMMANDS} == kinds
    assert {words[1] for words in COMMANDS if words[0] == "run"} == set(SMALLER)


def test_own_data_and_model(outputs: dict[str, str], workplace: Path) -> None:
    assert "40" in outputs[f"data check {PAIRS}"]
    run = workplace / "runs" / "own-data"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # The second `run` had nothing left to do: one PPO step and one evaluation are logged, once.
    assert [line["stage"] for line in lines if line["stage"] != "hydra_sft"] == ["ppo", "evaluation"]
    data = json.loads((run / "data.json").read_text())
    assert data["train"]["rows_used"] + data["test"]["rows_used"] == 40
    assert (run / "hydra_sft" / "reward_head.safetensors").is_file()


def test_the_plan_says_what_fits(outputs: dict[str, str]) -> None:
    (planned,) = (text for words, text in outputs.items() if words.startswith("plan "))
    verdict = " ".join(planned.split("LoRA rank")[0].split())
    assert re.match(r"hydra-ppo fits \d+ GiB: [\d.]+ GiB at its largest phase", verdict)
    assert re.search(r"micro-batches of [\d,]+ tokens", verdict)
    assert "full SFT" in planned


def test_the_benchmark_is_printed_written_and_drawn(outputs: dict[str, str], workplace: Path) -> None:
    (printed,) = (text for words, text in outputs.items() if words.startswith("bench "))
    assert "Equal batch" in printed
    assert "Equal memory" in printed
    rows = json.loads((workplace / "bench.json").read_text())["equal_batch"]
    assert [row["method"] for row in rows] == ["lora-ppo", "hydra-ppo"]
    assert (workplace / "bench.svg").is_file()


def test_quick_run_is_summarised_sampled_and_evaluated(outputs: dict[str, str], workplace: Path) -> None:
    run = workplace / "runs" / "quick"
    shown = outputs["run recipes/quick.yaml"]
    for word in ("Reward accuracy", "KL", "prompt", "reference", "actor", "runs/quick/report.html"):
        assert word in shown
    sampled = outputs["sample runs/quick --num-prompts 2"]
    assert sampled.count("prompt     ") == 2
    assert len(re.findall(r"^(?:reference|actor)\s+[+-]\d+\.\d\d", sampled, flags=re.M)) == 4
    (talk,) = (text for words, text in outputs.items() if words.startswith("chat "))
    assert talk.startswith("prompt     Stock note: lamp,")
    assert len(re.findall(r"^ +(?:actor|reference): score [+-]\d+\.\d\d, ", talk, flags=re.M)) == 2
    best = json.loads((run / "evaluation-best.json").read_text())
    assert best["checkpoint"].startswith("best (step ")
    summary = json.loads((run / "summary.json").read_text())
    assert best["reward_accuracy"] == summary["reward_accuracy"]
    assert best["checkpoint"].removeprefix("best") != summary["checkpoint"].removeprefix("last") or (
        best["score_mean"] == summary["score_mean"]
    )
    assert "evaluation-best.json" in outputs["eval runs/quick --checkpoint best"]
    assert outputs["report runs/quick"].strip() == "runs/quick/report.html"
    page = (run / "report.html").read_text()
    assert "quick" in page
    assert (run / "report.md").is_file()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # peft calls the old name
def test_exported_policies_load_elsewhere_and_agree(outputs: dict[str, str], workplace: Path) -> None:
    """The adapter on its base by PEFT, and the merged folder by transformers: the same logits, not the base's."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert outputs["export runs/quick exported/actor --format peft"].strip() == "exported/actor"
    ids = AutoTokenizer.from_pretrained(workplace / "exported/policy")("How much is the clock?", return_tensors="pt")
    base = AutoModelForCausalLM.from_pretrained(workplace / "runs/quick/hydra_sft")
    merged = AutoModelForCausalLM.from_pretrained(workplace / "exported/policy")
    with torch.no_grad():
        before = base(**ids).logits
        with_adapter = PeftModel.from_pretrained(base, str(workplace / "exported/actor"))(**ids).logits
        assert_close(merged(**ids).logits, with_adapter, atol=1e-4, rtol=1e-4)
    assert not torch.equal(with_adapter, before)
    assert "tokenizer.json" in {file.name for file in (workplace / "exported/actor").iterdir()}


def test_exported_reward_model_loads_as_a_sequence_classifier(outputs: dict[str, str], workplace: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    from hydra_rlhf import HydraModel
    from hydra_rlhf.records import TokenBatch

    folder = workplace / "exported" / "reward"
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    assert classifier.config.num_labels == 1
    tokens = torch.arange(5, 15)[None]
    everything = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        logit = classifier(input_ids=tokens).logits[0, 0]
        ours = (
            HydraModel.from_pretrained(str(workplace / "runs/quick/hydra_sft"))
            .evaluate(
                TokenBatch(tokens=tokens, attention_mask=everything, response_mask=everything[:, 5:]), ["reward"]
            )["reward"]
            .scores
        )
    assert ours is not None
    assert_close(logit + classifier.config.reward_bias, ours[0], atol=1e-5, rtol=1e-5)


def test_the_python_block(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    small = "PPOConfig(num_steps=1, rollout_batch_size=4, minibatch_size=2, sampling={'max_response_tokens': 6})"
    code, replaced = re.subn(r"PPOConfig\(num_steps=\d+\)", small, code)
    assert replaced == 1
    monkeypatch.chdir(workplace)
    exec(compile(code, "README.md", "exec"), names := {})
    assert len(names["pairs"].rows) == 40
    config = json.loads((workplace / "out/actor/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (workplace / "out/actor/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("way", ["module", "script"])
def test_the_command_itself(way: str, tmp_path: Path) -> None:
    argv = command("--help")
    if way == "script":
        script = Path(sys.executable).with_name("hydra-rlhf")
        if not script.is_file():
            pytest.skip(f"the package is not installed here: no {script}")
        argv = [str(script), "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment(), cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("run", "demo", "sample", "chat", "eval", "compare", "report", "export", "data"):
        assert re.search(rf"^    {name}\b", done.stdout, flags=re.M), name
