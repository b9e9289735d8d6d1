"""Commands that need no model load none of the libraries that a model needs, so that they answer at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "datasets", "tokenizers", "numpy", "pandas", "pyarrow", "matplotlib")
LOADED = f"""
import sys
from hydra_rlhf.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print("loaded:", *[name for name in {HEAVY} if name in sys.modules])
"""


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "--version",
        "plan --help",
        "settings",
        "data check FILE",
        "data check world",
        "data formats",
        "chat --help",
    ],
)
def test_light_commands_stay_light(command: str, tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "2 + 2", "chosen": "4", "rejected": "5"}) + "\n")
    words = [str(file) if word == "FILE" else word for word in command.split()]
    done = subprocess.run([sys.executable, "-c", LOADED, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"
