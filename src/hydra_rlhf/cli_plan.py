"""`hydra-rlhf plan`: its options, and what it prints. Imports torch only when it runs."""

import argparse
import gc
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_rlhf.cli_evaluation import add_trust_option
from hydra_rlhf.errors import ConfigError

if TYPE_CHECKING:
    from hydra_rlhf.config import Recipe

WHAT = "what each method needs, per phase, and what fits; reads the model's config and no weight"
READERS = Callable[["Path | None", Sequence[str]], "Recipe"]


def add_plan_command(commands: Any, *, read_recipe: READERS, epilog: str) -> None:
    """The command's parser; `read_recipe` lays settings over the recipe of a file, or over the defaults."""
    command = commands.add_parser(
        "plan",
        help=WHAT,
        description=f"{WHAT}. RECIPE: YAML file, the first word after `plan` (default: every setting's default)",
        epilog=epilog,
        usage="hydra-rlhf plan [RECIPE] [--model MODEL] [--budget BYTES] [--method METHOD] [--probe] [--json]",
    )
    command.add_argument("--model", help="hub name, folder, scratch:NAME or shape:NAME (e.g. shape:llama-2-7b)")
    command.add_argument("--budget", help="bytes to stay within, e.g. 24GiB (default: what is free here)")
    command.add_argument("--method", action="append", help="plan this method only (repeatable)")
    probe = "run one PPO step of two layers of the model's size, which takes a while, and correct the plan by it"
    command.add_argument("--probe", action="store_true", help=probe)
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_trust_option(command)
    command.set_defaults(command=partial(plan, read_recipe=read_recipe), takes_settings=True)


def plan(args: argparse.Namespace, *, read_recipe: READERS) -> None:
    """`plan`: memory of every method before a weight is loaded."""
    recipe = planned_recipe(args, read_recipe)
    methods = methods_named(args.method)
    if args.probe:
        check_probe(args.method or [recipe.method])

    from hydra_rlhf.memory.report import plan_methods
    from hydra_rlhf.reporting.plan_table import print_plan

    gc.disable()  # to look through all that was imported once more takes as long as the plan of a method
    try:
        corrections: dict[str, float] = {}
        if args.probe:
            from hydra_rlhf.stages.probe_step import probe_step

            corrections = probe_step(recipe, trust_remote_code=args.trust_remote_code)
        planned = plan_methods(recipe, methods, corrections, trust_remote_code=args.trust_remote_code)
    finally:
        gc.enable()
    if args.json:
        print(json.dumps(planned, indent=1))
    else:
        print_plan(planned, detailed=args.method or [recipe.method])


def planned_recipe(args: argparse.Namespace, read_recipe: READERS) -> "Recipe":
    """The recipe that `plan` is asked about: a file or the defaults, with its short options and overrides."""
    from hydra_rlhf.config_checks import check_bytes_or_auto

    if args.budget is not None:
        try:
            check_bytes_or_auto(args.budget)
        except ValueError as error:
            raise ConfigError(f"--budget {args.budget}: {error}") from None
    short = [("--model.path", args.model), ("--memory.budget", args.budget)]
    options = [word for name, value in short if value is not None for word in (name, value)]
    # An optional positional argument of argparse would also take the value of a setting that argparse does not know.
    has_file = bool(args.overrides) and not args.overrides[0].startswith("-")
    recipe = Path(args.overrides[0]) if has_file else None
    return read_recipe(recipe, [*options, *args.overrides[has_file:]])


def methods_named(names: Sequence[str] | None) -> tuple[str, ...]:
    """The methods to plan: those named, else all. Raises `ConfigError`."""
    from hydra_rlhf.config_checks import GROUP_ESTIMATORS, TOKEN_ESTIMATORS
    from hydra_rlhf.model.roles import ROLES

    for name in names or ():
        if name in ROLES:
            continue
        if name in (*GROUP_ESTIMATORS, *TOKEN_ESTIMATORS, "remax"):
            hint = f"it is an advantage estimator: use --method hydra-ppo --ppo.advantage-estimator {name}"
            raise ConfigError(f"--method {name}: there is no such method; {hint}")
        raise ConfigError(f"--method {name}: there is no such method; choose from {', '.join(ROLES)}")
    return tuple(names or ROLES)


def check_probe(methods: Sequence[str]) -> None:
    """Raise `ConfigError` where a method has no PPO step that a probe could run."""
    from hydra_rlhf.model.roles import STAGE2

    for name in methods:
        if STAGE2[name] != "ppo":
            raise ConfigError(f"--probe runs one PPO step, and method={name} has none; leave it out")
