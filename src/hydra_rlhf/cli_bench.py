"""`hydra-rlhf bench`: its options, and what it prints and writes. Imports torch only when it runs."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_rlhf.errors import ConfigError

if TYPE_CHECKING:
    from hydra_rlhf.config import Recipe

DESCRIPTION = """\
Memory of the methods at an equal batch, and their time per sample at an equal memory budget, on this machine: PPO steps
by the code that trains, with random weights of a known shape or with a model's. The first step is not timed where there
are others; the rest are medians. A method that the memory plan does not let run is shown as planned."""
READERS = Callable[["Recipe", Sequence[str]], "Recipe"]


def add_bench_command(
    commands: Any, *, read_recipe: READERS, methods_named: Callable[[Sequence[str] | None], tuple[str, ...]]
) -> None:
    """The command's parser; the two functions of the command line lay settings over a recipe and check method names."""
    command = commands.add_parser(
        "bench",
        help="memory and time per sample of the methods on this machine",
        description=DESCRIPTION,
        epilog="Any setting can be given as --section.name value, e.g. --model.quantization nf4 or --ppo.num-epochs 4.",
    )
    model = command.add_mutually_exclusive_group()
    model.add_argument("--model", help="model folder or hub name")
    model.add_argument("--shape", help="random weights of a known shape, e.g. smollm2-135m (default), llama-7b")
    command.add_argument("--method", action="append", help="this method only (repeatable; default: all with PPO)")
    command.add_argument("--batch", type=positive, default=16, help="sequences per PPO step (default: 16)")
    command.add_argument("--prompt-tokens", type=positive, default=64, help="of each prompt; the most, with --prompts")
    command.add_argument("--response-tokens", type=positive, default=64, help="of each response, no fewer and no more")
    command.add_argument("--prompts", help="file with real prompts (any format that can be read), for their lengths")
    command.add_argument(
        "--micro-batch", type=positive, help="sequences per forward (default: the memory plan decides)"
    )
    command.add_argument("--iterations", type=positive, default=3, help="PPO steps of each measurement (default: 3)")
    command.add_argument("--rank", type=positive, default=16, help="of the LoRA sets (default: 16); alpha is twice it")
    command.add_argument("--targets", nargs="+", help="last names of the linears to adapt (default: all linears)")
    command.add_argument("--dtype", help="model.dtype of the base: auto (default), float32 or bfloat16")
    command.add_argument("--device", help="model.device, e.g. cpu or cuda")
    command.add_argument("--checkpointing", help="memory.checkpointing: none, layers or auto")
    command.add_argument("--budget", help="memory of the comparison at an equal budget, and the most a method may use")
    command.add_argument(
        "--compare",
        choices=["batch", "budget"],
        action="append",
        help="at an equal batch, at an equal budget (default: both; for one method without --budget the batch alone)",
    )
    command.add_argument("--max-batch", type=positive, default=256, help="most sequences tried to fit the budget")
    command.add_argument(
        "--time-only",
        action="store_true",
        help="count no memory: on a CPU one further step is run for that, in which every tensor is counted",
    )
    command.add_argument("--json", help="write all numbers to this file; - prints them instead of the table")
    command.add_argument("--picture", type=Path, help="draw them into this file, .svg or .png")
    run = partial(bench, read_recipe=read_recipe, methods_named=methods_named)
    command.set_defaults(command=run, takes_settings=True)


def positive(text: str) -> int:
    """An integer above zero, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def bench(
    args: argparse.Namespace,
    *,
    read_recipe: READERS,
    methods_named: Callable[[Sequence[str] | None], tuple[str, ...]],
) -> None:
    """Measure, then print, write and draw."""
    check_words(args)
    methods = with_ppo(methods_named(args.method), all_named=args.method is not None)

    from hydra_rlhf.config import Recipe

    recipe = in_groups(read_recipe(Recipe(name="bench"), [*settings(args), *args.overrides]))

    from hydra_rlhf.benchmark.bench import COMPARISONS, Bench, run_bench
    from hydra_rlhf.reporting.bench_picture import save_picture
    from hydra_rlhf.reporting.bench_table import print_bench

    one_is_enough = len(methods) == 1 and recipe.memory.budget == "auto"
    compare = args.compare or (COMPARISONS[:1] if one_is_enough else COMPARISONS)
    found = run_bench(Bench(recipe, watch=not args.time_only, max_batch=args.max_batch), methods, compare)
    text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
    else:
        print_bench(found)
        if args.json is not None:
            Path(args.json).write_text(text, encoding="utf-8")
    if args.picture is not None:
        save_picture(found, args.picture)


def with_ppo(methods: Sequence[str], *, all_named: bool) -> tuple[str, ...]:
    """The methods that have PPO steps to be timed. Raises `ConfigError` where one that was named has none."""
    from hydra_rlhf.model.roles import methods_with

    timed = methods_with("ppo")
    without = [method for method in methods if method not in timed]
    if without and all_named:
        raise ConfigError(
            f"--method {without[0]}: a benchmark is of PPO steps, and this method has none; leave it out "
            f"(`hydra-rlhf plan --method {without[0]}` says what it needs)"
        )
    return tuple(method for method in methods if method not in without)


def check_words(args: argparse.Namespace) -> None:
    """Raise `ConfigError` for a budget that is no number of bytes and for a picture of a kind that is not drawn."""
    from hydra_rlhf.config_checks import parse_bytes

    if args.budget is not None and args.budget != "auto":
        parse_bytes(args.budget)
    if args.picture is not None and args.picture.suffix not in (".svg", ".png"):
        raise ConfigError(f"--picture {args.picture}: name a file that ends in .svg or .png")


def settings(args: argparse.Namespace) -> list[str]:
    """The command's options as settings of a recipe."""
    size = args.batch
    named = {
        "model.path": args.model or shape_path(args.shape or "smollm2-135m"),
        "model.dtype": args.dtype,
        "model.device": args.device,
        "lora.rank": args.rank,
        "lora.alpha": 2.0 * args.rank,
        "memory.budget": args.budget,
        "memory.checkpointing": args.checkpointing,
        "data.prompts": args.prompts,
        "data.max-prompt-tokens": args.prompt_tokens,
        "ppo.num-steps": args.iterations,
        "ppo.rollout-batch-size": size,
        "ppo.minibatch-size": size,
        "ppo.num-epochs": 1,
        "ppo.micro-batch-tokens": (
            None if args.micro_batch is None else args.micro_batch * (args.prompt_tokens + args.response_tokens)
        ),
        "ppo.sampling.max-response-tokens": args.response_tokens,
        "ppo.sampling.min-response-tokens": args.response_tokens,
        "ppo.eval-every": 0,
        "ppo.save-every": 0,
        "ppo.num-logged-samples": 0,
    }
    words = [word for name, value in named.items() if value is not None for word in (f"--{name}", str(value))]
    return [*words, "--lora.targets", *args.targets] if args.targets else words


def in_groups(recipe: "Recipe") -> "Recipe":
    """The recipe with as many sequences as `--batch` says, where several of them answer one prompt."""
    from dataclasses import replace

    ppo = recipe.ppo
    size, each = ppo.rollout_batch_size, ppo.samples_per_prompt
    if each == 1 or size != ppo.minibatch_size or size % each:
        return recipe  # sizes that were set are told to be wrong by what reads them
    return replace(recipe, ppo=replace(ppo, rollout_batch_size=size // each))


def shape_path(name: str) -> str:
    """`shape:NAME`; what says already what it is (`scratch:tiny`, a folder with a config) stays as it is."""
    return name if ":" in name or Path(name).is_dir() else f"shape:{name}"
