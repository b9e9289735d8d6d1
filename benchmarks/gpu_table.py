"""The methods at the Llama-7B shape on one GPU, with random weights: memory, seconds by phase, and what a budget buys.

    python benchmarks/gpu_table.py --out benchmarks/results/gpu.json --part methods
    python benchmarks/gpu_table.py --out benchmarks/results/gpu.json --part nf4
    python benchmarks/gpu_table.py --out benchmarks/results/gpu.json --part curve --budgets 64GiB 70GiB

Every row is written as soon as it is there, so that a part which is cut off keeps what it has. `--method` runs a part
for some methods and leaves the rows of the others in the file.
"""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_recipe import bench_recipe
from memory_workload import MIB
from parts import write_part

from hydra_rlhf.benchmark.bench import Bench, describe, equal_batch, equal_budget
from hydra_rlhf.benchmark.measure import machine_settings
from hydra_rlhf.cli_bench import shape_path
from hydra_rlhf.config import Recipe
from hydra_rlhf.config_checks import parse_bytes
from hydra_rlhf.memory.budget import PROCESS_BYTES
from hydra_rlhf.model.load import pick_device
from hydra_rlhf.model.roles import methods_with

CURVE_METHODS = ("lora-ppo", "hydra-ppo")
Rows = Iterator[tuple[Bench, dict[str, Any]]]


def bench_of(args: argparse.Namespace, **changes: Any) -> Bench:
    """The benchmark of the command line's model and workload, with some settings changed."""
    settings: dict[str, Any] = {
        "batch": args.batch,
        "prompt": args.prompt_tokens,
        "response": args.response_tokens,
        "iterations": args.iterations,
        "dtype": args.dtype,
        "device": args.device,
        "rank": args.rank,
        "targets": tuple(args.targets),
    }
    recipe: Recipe = bench_recipe(shape_path(args.shape), **settings | changes)
    return Bench(recipe, watch=False, max_batch=args.max_batch)  # CUDA's allocator counts all the same


def methods(args: argparse.Namespace) -> Rows:
    """The five methods at an equal batch; what does not fit the device is planned only."""
    bench = bench_of(args)
    for row in equal_batch(bench, args.method or methods_with("ppo")):
        yield bench, row


def nf4(args: argparse.Namespace) -> Rows:
    """hydra-ppo on an NF4 base within `--nf4-budget`; on CUDA the allocator is held to that."""
    bench = bench_of(args, quantization="nf4", budget=args.nf4_budget)
    device = pick_device(args.device)
    with allocator_cap(device, parse_bytes(args.nf4_budget) - PROCESS_BYTES):
        for row in equal_batch(bench, args.method or ("hydra-ppo",)):
            yield bench, row


def curve(args: argparse.Namespace) -> Rows:
    """hydra-ppo against lora-ppo, each with the largest batch that fits, at several budgets."""
    for text in args.budgets:
        bench = bench_of(args, budget=text)
        for row in equal_budget(bench, args.method or CURVE_METHODS, bench.budget):
            yield bench, row | {"budget": text}


@contextlib.contextmanager
def allocator_cap(device: torch.device, num_bytes: int) -> Iterator[None]:
    """Hold CUDA's allocator of this process to so many bytes inside the block; on other devices nothing is held."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


PARTS: dict[str, Callable[[argparse.Namespace], Rows]] = {"methods": methods, "nf4": nf4, "curve": curve}


def parse_arguments() -> argparse.Namespace:
    """The command line; defaults are the paper's setting at the Llama-7B shape."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, or to renew parts of")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given more than once")
    parser.add_argument(
        "--method", choices=methods_with("ppo"), action="append", help="only this method; others' rows stay"
    )
    parser.add_argument("--shape", default="llama-7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--response-tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--targets", nargs="+", default=["q_proj", "k_proj", "v_proj", "o_proj"])
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--max-batch", type=int, default=256)
    parser.add_argument("--nf4-budget", default="12GiB")
    parser.add_argument("--budgets", nargs="+", default=["64GiB", "70GiB"], help="of the part `curve`")
    return parser.parse_args()


def key_of(row: dict[str, Any]) -> tuple[str, str | None]:
    """What a new row takes the place of."""
    return row["method"], row.get("budget")


def main() -> None:
    """Each part's rows, written one by one; rows of other methods and budgets stay."""
    args = parse_arguments()
    for part in args.part or PARTS:
        known: dict[str, Any] = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
        rows = {key_of(row): row for row in known.get(part, {}).get("rows", [])}
        with machine_settings(bench_of(args).recipe.runtime):
            for bench, row in PARTS[part](args):
                rows[key_of(row)] = row
                write_part(args.out, part, {"bench": describe(bench), "rows": list(rows.values())})
                told = "" if row["time"] is None else f", {row['time']['s_per_sample']:.3f} s/sample"
                print(f"{row['method']} x {row['batch']}: {row['status']}, {row['planned_bytes'] / MIB:.0f} MiB{told}")


if __name__ == "__main__":
    main()
