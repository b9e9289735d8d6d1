"""Write the tables of docs/results.md from the result files, between marker comments; numbers are typed by nobody.

    python benchmarks/tables.py            write them
    python benchmarks/tables.py --check    exit code 1 where the document is not what would be written

A table stands between `<!-- begin: NAME -->` and `<!-- end -->`. One whose results are not there yet says so, with the
command that makes them.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tables_alignment import ALIGNMENT_TABLES
from tables_memory import MEMORY_TABLES
from tables_speed import SPEED_TABLES

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "results.md"
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- begin: ([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
COMMANDS = {
    "memory": "python benchmarks/memory.py --out benchmarks/results/memory.json",
    "speed": "python benchmarks/speed.py --out benchmarks/results/speed.json",
    "gpu": "python benchmarks/gpu_table.py --out benchmarks/results/gpu.json",
    "alignment_study": "python benchmarks/alignment_study.py --work WORK --out benchmarks/results/alignment_study.json",
    "hydra_sft_study": "python benchmarks/hydra_sft_study.py --work WORK --out benchmarks/results/hydra_sft_study.json",
}
"""What makes each result file."""
Table = tuple[str, str, Callable[[Mapping[str, Any]], str]]
TABLES: Mapping[str, Table] = {**MEMORY_TABLES, **SPEED_TABLES, **ALIGNMENT_TABLES}
"""{name of the block: (result file, part of it, function from that part, its neighbours beside it, to Markdown)}."""


def filled(document: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The document with every block made anew. Raises `KeyError` for a block that no table is named after."""
    return BLOCK.sub(lambda found: f"{found[1]}{block(found[2], results)}\n{found[3]}", document)


def block(name: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """One table with the conditions it was measured under, or a note that it was not."""
    file, part, table = TABLES[name]
    content = results.get(file, {}).get(part)
    if content is None:
        return f"Not measured yet: `{command(file, part)}`."
    return f"{table({**results[file], **content})}\n\n{conditions(content)} Repeat: `{command(file, part)}`."


def command(file: str, part: str) -> str:
    """What makes a part of a result file."""
    return "make bench-rounds" if part == "peers" else f"{COMMANDS[file]} --part {part}"


def conditions(content: Mapping[str, Any]) -> str:
    """When and on what a part was measured, in one sentence."""
    if "bench" in content:
        environment, device = content["bench"]["environment"], content["bench"]["device"]
        versions = environment["versions"]
        return (
            f"Measured {environment['started'][:10]} on {device}, torch {versions['torch']}, "
            f"transformers {versions['transformers']}."
        )
    measured = content["measured"]
    versions = measured["versions"]
    return (
        f"Measured {measured['date']} on {measured['cores']} cores ({measured['cpu']}), {measured['threads']} threads, "
        f"torch {versions['torch']}, transformers {versions['transformers']}; load average before: "
        f"{measured['load_average_before'][0]:.1f}."
    )


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Every result file that tables are made of and that is there."""
    return {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name in COMMANDS
        if (path := folder / f"{name}.json").exists()
    }


def main() -> None:
    """Write the document, or check it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where something would change")
    args = parser.parse_args()
    before = DOCUMENT.read_text(encoding="utf-8")
    after = filled(before, read_results(RESULTS))
    if args.check:
        sys.exit(int(before != after))
    DOCUMENT.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
