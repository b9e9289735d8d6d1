"""The plan's answers about Llama-2-7B that docs/results.md promises, by the commands that stand there."""

import shlex

import pytest

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


@pytest.mark.parametrize(("line", "gib"), list(zip(LINES, ("22.60", "11.48"), strict=True)), ids=["24GiB", "12GiB"])
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
    verdict = f"None of 2 methods fits {budget.replace('GiB', ' GiB')} as it is set."
    assert text.startswith(f"{verdict} With {changes} j-hydra-ppo and hydra-ppo fit.")
    assert f"hydra-ppo: fits with {changes}." in text
    assert "NAME=VALUE is given as --NAME VALUE" in text
    # For a single method the verdict itself says it.
    one = said(capfd, "plan", "--model", "shape:llama-2-7b", "--budget", budget, "--method", "hydra-ppo")
    assert f"at the least; fits with {changes}." in one
    assert one.count("fits with") == 1
