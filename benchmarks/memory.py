"""Memory of this project's PPO beside GRPO's price and full SFT, and what a layer keeps.

    python benchmarks/memory.py --out benchmarks/results/memory.json

Each part can be run alone (`--part kept`); the others' results stay in the file. Weights are random and made anew in a
temporary folder. Beside its peers it is measured by `peers_rounds.py`.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memory_workload import HERE, Workload, last_json, make_workload, run_measured
from parts import circumstances, write_part

UPDATES = 2
"""PPO updates of a run; the second holds all that later ones do."""
GRPO_BAR = 1.12
"""Most of the peak tensor bytes that the critic may cost."""
SFT_BAR = 0.40
"""Most of full SFT's peak tensor bytes that hydra-ppo may need."""
KEPT_BAR = 1.10
"""Most that a layer may keep over what it cannot do without."""


def tensor_bytes(args: argparse.Namespace, work: Path, workload: Workload, run: str, policy: str) -> dict[str, Any]:
    """Peak tensor bytes of one run of this program in its own process."""
    options = workload.peer_options()
    command = [sys.executable, str(HERE / "memory_tensors.py"), str(work), run, "--checkpointing", policy, *options]
    return last_json(run_measured(command, threads=args.threads).output) | {"checkpointing": policy}


def grpo_price(args: argparse.Namespace, work: Path, workload: Workload) -> dict[str, Any]:
    """hydra-ppo against the same run without its critic: what PPO costs above GRPO."""
    return {
        policy: compare(
            tensor_bytes(args, work, workload, "hydra-ppo", policy),
            tensor_bytes(args, work, workload, "no-critic", policy),
            bar=GRPO_BAR,
        )
        for policy in ("none", "layers")
    }


def full_sft(args: argparse.Namespace, work: Path, workload: Workload) -> dict[str, Any]:
    """hydra-ppo against full fine-tuning, both with every layer checkpointed and the same tokens per forward."""
    return compare(
        tensor_bytes(args, work, workload, "hydra-ppo", "layers"),
        tensor_bytes(args, work, workload, "full-sft", "layers"),
        bar=SFT_BAR,
    )


def compare(ours: dict[str, Any], other: dict[str, Any], *, bar: float) -> dict[str, Any]:
    """Two runs and the ratio of their peaks."""
    return {"ratio": ours["peak_tensor_bytes"] / other["peak_tensor_bytes"], "bar": bar, "runs": [ours, other]}


def kept(args: argparse.Namespace, work: Path, workload: Workload) -> dict[str, Any]:  # noqa: ARG001  # needs no workload
    """Bytes that a layer keeps for backward, against the ideal and against PEFT's default."""
    found = last_json(run_measured([sys.executable, str(HERE / "memory_kept.py")], threads=args.threads).output)
    return found | {"worst_ratio": max(row["ratio_to_ideal"] for row in found["rows"]), "bar": KEPT_BAR}


PARTS: dict[str, Callable[[argparse.Namespace, Path, Workload], dict[str, Any]]] = {
    "kept": kept,
    "grpo_price": grpo_price,
    "full_sft": full_sft,
}


def parse_arguments() -> argparse.Namespace:
    """The command line; defaults are the peers' workload."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, or to renew parts of")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given more than once")
    parser.add_argument("--shape", choices=["30m", "60m", "135m"], default="135m")
    parser.add_argument("--batch", type=int, default=16, help="sequences per update")
    parser.add_argument("--response", type=int, default=64, help="tokens of each response")
    parser.add_argument("--micro", type=int, default=4, help="rows per forward of the update")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA sets")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of every process")
    return parser.parse_args()


def main() -> None:
    """Measure the chosen parts, one after the other, and write each as soon as it is there."""
    args = parse_arguments()
    workload = Workload(
        shape=args.shape,
        batch=args.batch,
        response=args.response,
        micro=args.micro,
        rank=args.rank,
        updates=UPDATES,
    )
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        work = Path(folder)
        make_workload(work, workload.shape)
        for name in args.part or PARTS:
            before = {"measured": circumstances(args.threads), "workload": asdict(workload)}
            write_part(args.out, name, before | PARTS[name](args, work, workload))


if __name__ == "__main__":
    main()
