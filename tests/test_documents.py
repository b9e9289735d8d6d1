"""Promises of the documents: commands, options, recipes, make targets, links and files they name exist."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "hydra_rlhf"
DOCUMENTS = sorted((*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))


def readme_commands() -> list[list[str]]:
    """Every command of README.md's `sh` blocks, split into words; a missing README is an error."""
    blocks = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line.removeprefix("$ "), comments=True))]


@cache
def help_text(*words: str) -> str:
    """What `hydra-rlhf <words> --help` prints; fails where there is no such command."""
    code = "import sys; from hydra_rlhf.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *words, "--help"]
    wide = os.environ | {"PYTHONPATH": str(ROOT / "src"), "COLUMNS": "500"}
    done = subprocess.run(command, capture_output=True, text=True, env=wide, check=False)
    assert done.returncode == 0, f"hydra-rlhf {' '.join(words)} --help: {done.stderr or done.stdout}"
    return done.stdout


def is_setting(option: str) -> bool:
    """Whether `--ppo.kl-coef` names a field of a recipe."""
    from hydra_rlhf.config import Recipe

    where: Any = Recipe
    for name in option.removeprefix("--").replace("-", "_").split("."):
        found = {f.name: f.type for f in dataclasses.fields(where)} if dataclasses.is_dataclass(where) else {}
        if name not in found:
            return False
        where = found[name]
    return True


def test_every_command_in_the_readme_exists() -> None:
    commands = [words[1:] for words in readme_commands() if words[0] == "hydra-rlhf"]
    assert commands
    for words in commands:
        # A command is one word, or two where the first one has commands of its own (`data check`).
        num_words = 2 if words[0] == "data" else 1
        text = help_text(*words[:num_words])
        for word in words[num_words:]:
            option = word.split("=")[0]
            if option.startswith("--"):
                assert is_setting(option) or re.search(rf"{re.escape(option)}\b", text), (
                    f"{' '.join(words)}: no {option}"
                )
            elif re.search(r"\.ya?ml$", word):
                assert (ROOT / word).is_file(), f"{' '.join(words)}: no {word}"


def test_every_make_target_in_a_document_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    named = {t for path in DOCUMENTS for t in re.findall(r"`make ([a-z]+)`", path.read_text("utf-8"))}
    named |= {words[1] for words in readme_commands() if words[0] == "make"}
    assert named
    assert named <= targets


def test_links_between_documents_lead_somewhere() -> None:
    wrong = []
    for path in DOCUMENTS:
        text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", text):
            if not re.match(r"[a-z]+:", target) and not (path.parent / target).exists():
                wrong.append(f"{path.relative_to(ROOT)}: {target}")
    assert not wrong, "\n".join(wrong)


def test_the_glossary_names_files_that_exist() -> None:
    rows = [
        line.split("|")
        for line in (ROOT / "docs" / "glossary.md").read_text("utf-8").splitlines()
        if line.startswith("| ")
    ]
    named = {name for row in rows for name in re.findall(r"`([a-z0-9_./]+\.py)`", row[-2])}
    assert len(named) > 10
    assert not sorted(name for name in named if not (SRC / name).is_file())
