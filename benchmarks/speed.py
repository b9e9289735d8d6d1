"""Time per sample of this project's PPO: of the five methods, as it grows, of a decode step against its floor.

    python benchmarks/speed.py --out benchmarks/results/speed.json

Each part can be run alone (`--part ladder`); the others' results stay in the file, and each is written as soon as it is
there. Weights are random. Beside its peers it is measured by `peers_rounds.py`.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory_workload import HERE, last_json, run_measured
from parts import circumstances, write_part
from speed_runs import measure_ladder


def ladder(args: argparse.Namespace) -> dict[str, Any]:
    """The five methods at an equal batch, in turns, and what j-hydra-ppo takes of hydra-ppo's time."""
    options = ["--shape", args.shape, "--batch", str(args.ladder_batch), "--response-tokens", str(args.response)]
    return measure_ladder(args.hydra_python, options, repeats=args.ladder_repeats, threads=args.threads)


def own_process(script: str) -> Callable[[argparse.Namespace], dict[str, Any]]:
    """A part that is a script of its own; the smallest form of each is `--quick`."""

    def run(args: argparse.Namespace) -> dict[str, Any]:
        command = [args.hydra_python, str(HERE / script), *(["--quick"] if args.quick else [])]
        if script in ("decode_floor.py", "decode_engines.py"):
            command += ["--shape", args.shape]
        return last_json(run_measured(command, threads=args.threads).output)

    return run


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "ladder": ladder,
    "scaling": own_process("scaling.py"),
    "decode_floor": own_process("decode_floor.py"),
    "decode_engines": own_process("decode_engines.py"),
    "unequal_lengths": own_process("unequal_lengths.py"),
}


def parse_arguments() -> argparse.Namespace:
    """The command line; defaults are what the document shows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, or to renew parts of")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given more than once")
    parser.add_argument("--quick", action="store_true", help="the smallest form of the parts that measure this project")
    parser.add_argument("--shape", default="smollm2-135m", help="model of `ladder` and of what decodes")
    parser.add_argument("--response", type=int, default=64, help="tokens of each response of `ladder`")
    parser.add_argument("--ladder-batch", type=int, default=8, help="sequences per PPO step of `ladder`")
    parser.add_argument("--ladder-repeats", type=int, default=2, help="rounds of `ladder`")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of every process")
    parser.add_argument("--hydra-python", default=sys.executable, help="environment of this project's side")
    return parser.parse_args()


def main() -> None:
    """Measure the chosen parts, one after the other."""
    args = parse_arguments()
    for name in args.part or PARTS:
        before = {"measured": circumstances(args.threads)}
        write_part(args.out, name, before | PARTS[name](args))


if __name__ == "__main__":
    main()
