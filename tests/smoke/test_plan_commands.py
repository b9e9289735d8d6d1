"""The plan's answers about Llama-2-7B that docs/results.md promises, by the commands that stand there."""

import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoConfig

from smoke.tiny_runs import ROOT, exit_code

LINES = [
    shlex.split(line)[1:]
    for line in (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("hydra-rlhf plan --model shape:llama-2-7b")
]


def said(capfd: pytest.CaptureFixture[str], *argv: str) -> str:
    """What the command prints, without line breaks."""
    capfd.readouterr()
    assert exit_code(*argv) == 0
    return " ".join(capfd.readouterr().out.split())


@pytest.mark.parametrize(("line", "gib"), list(zip(LINES, ("22.56", "11.39"), strict=True)), ids=["24GiB", "12GiB"])
def test_the_papers_setting_fits(line: list[str], gib: str, capfd: pytest.CaptureFixture[str]) -> None:
    budget = line[line.index("--budget") + 1].replace("GiB", " GiB")
    assert said(capfd, *line).startswith(f"hydra-ppo fits {budget}: {gib} GiB at its largest phase")


@pytest.mark.parametrize(
    ("budget", "changes"),
    [("24GiB", "model.dtype=bfloat16, hydra_sft.tuning=lora"), ("12GiB", "model.quantization=nf4")],
)
def test_a_newcomer_is_told_what_to_set(budget: str, changes: str, capfd: pytest.CaptureFixture[str]) -> None:
    methods = [word for method in ("j-hydra-ppo", "hydra-ppo") for word in ("--method", method)]
    text = said(capfd, "plan", "--model", "shape:llama-2-7b", "--budget", budget, *methods)
    verdict = f"As it is set none of 2 methods fits {budget.replace('GiB', ' GiB')}."
    assert text.startswith(f"{verdict} With {changes} j-hydra-ppo and hydra-ppo fit.")
    assert f"hydra-ppo: fits with {changes}." in text
    assert "NAME=VALUE is given as --NAME VALUE" in text
    # For a single method the verdict itself says it.
    one = said(capfd, "plan", "--model", "shape:llama-2-7b", "--budget", budget, "--method", "hydra-ppo")
    assert f"at the least; fits with {changes}." in one
    assert one.count("fits with") == 1


def test_the_verdict_says_how_many_graphs_wait(capfd: pytest.CaptureFixture[str]) -> None:
    """Four micro-batches of a joined pass, and room for all."""
    sizes = ["--ppo.rollout_batch_size", "8", "--ppo.minibatch_size", "8", "--ppo.num_epochs", "1"]
    tokens = [
        "--data.max_prompt_tokens",
        "8",
        "--ppo.sampling.max_response_tokens",
        "8",
        "--ppo.micro_batch_tokens",
        "32",
    ]
    text = said(
        capfd, "plan", "--model", "scratch:tiny", "--method", "j-hydra-ppo", "--budget", "8GiB", *sizes, *tokens
    )
    assert "no layer recomputed, 4 graphs kept until all values are known." in text


@pytest.mark.parametrize("budget", ["64MiB", "2GiB"])
def test_what_it_needs_is_enough(budget: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The budget that is named where no setting helps, given with these settings, fits: it is rounded up."""
    line = ["plan", "--model", "shape:llama-2-7b" if budget == "2GiB" else "scratch:tiny", "--method", "hydra-ppo"]
    text = said(capfd, *line, "--budget", budget)
    found = re.search(r"no setting makes it fit; with (.*?) it needs a budget of (\S+)\.", text)
    assert found is not None, text
    assert "0.44 GiB less for the process itself" in text
    options = [word for change in found[1].split(", ") for word in f"--{change}".split("=")]
    again = said(capfd, *line, "--budget", found[2], *options)
    assert "fits" in again.split(":")[0]
    assert "not fit" not in again.split(":")[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "24"], "--budget 24: not a number of bytes above zero; write it as 24GiB"),
        (["--method", "grpo"], "use --method hydra-ppo --ppo.advantage-estimator grpo"),
        (["--method", "hydra"], "there is no such method; choose from"),
        (["--method", "dpo", "--probe"], "--probe runs one PPO step, and method=dpo has none"),
        (["--model", "shape:llama"], "shape:llama-7b"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(
    options: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("plan", "--model", "shape:llama-2-7b", *options) == 2
    assert message in " ".join(capfd.readouterr().err.split())


def test_a_family_that_reads_numbers_is_refused_by_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Recurrent layers: shapes alone do not say how they run."""
    config = AutoConfig.for_model(
        "qwen3_next",
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=4,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        architectures=["Qwen3NextForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    assert exit_code("plan", "--model", str(tmp_path), "--method", "hydra-ppo") == 2
    assert "Qwen3NextForCausalLM cannot be planned" in " ".join(capfd.readouterr().err.split())
