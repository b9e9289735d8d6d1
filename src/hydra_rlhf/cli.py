"""`hydra-rlhf`: one function per command. Imports torch only in commands that need it."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_rlhf.cli_bench import add_bench_command
from hydra_rlhf.cli_chat import add_chat_command
from hydra_rlhf.cli_data import add_data_command
from hydra_rlhf.cli_evaluation import (
    RUN,
    add_checkpoint_option,
    add_evaluation_commands,
    add_trust_option,
    positive_int,
)
from hydra_rlhf.cli_plan import add_plan_command, methods_named
from hydra_rlhf.errors import ConfigError, HydraError

if TYPE_CHECKING:
    from hydra_rlhf.config import Recipe

SETTINGS_EPILOG = "Any setting can be given as --section.name value; `hydra-rlhf settings` lists them all."
INTERRUPTED = 130
DEMO_RECIPE = Path(__file__).parent / "demo.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 bad input, 130 interrupted, 143 terminated."""
    args, overrides = build_parser().parse_known_args(argv)
    if overrides and not getattr(args, "takes_settings", False):
        build_parser().error(f"unrecognised arguments: {' '.join(overrides)}")
    args.overrides = overrides
    try:
        args.command(args)
    except HydraError as error:
        if args.debug:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def program() -> None:
    """`main` as a process of its own: once it is interrupted, a Ctrl-C more does not change how it ends."""
    code = main()
    if code == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def build_parser() -> argparse.ArgumentParser:
    """Every command with its arguments."""
    parser = argparse.ArgumentParser(
        prog="hydra-rlhf",
        description="Memory-efficient RLHF: actor, critic, reference and reward model on one base.",
        epilog="Begin with `hydra-rlhf demo`; `hydra-rlhf COMMAND --help` says more of each command. Exit codes: 0 "
        "done, 1 failed, 2 bad input, 130 interrupted, 143 terminated.",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--version", action="version", version=f"%(prog)s {sys.modules['hydra_rlhf'].__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_recipe_commands(commands)
    add_plan_command(commands, read_recipe=recipe_with_overrides, epilog=SETTINGS_EPILOG)
    add_bench_command(commands, read_recipe=recipe_with_overrides, methods_named=methods_named)
    add_evaluation_commands(commands)
    add_run_commands(commands)
    add_data_command(commands, read_recipe=recipe_with_overrides)
    return parser


def add_recipe_commands(commands: Any) -> None:
    """Commands that take a recipe, and any of its settings as `--section.name value`."""
    stages = {
        "run": ("evaluation", "run a recipe: all stages in order, each skipped if already finished, and the report"),
        "sft": ("sft", "run a recipe's stages up to its SFT model"),
        "reward-model": ("reward_model", "run a recipe's stages up to its separate reward model"),
        "hydra-sft": ("hydra_sft", "run a recipe's stages up to its joint SFT and reward model"),
        "ppo": ("ppo", "run a recipe's stages up to PPO, without evaluation"),
        "preference": (
            "preference",
            "run a recipe's stages up to preference training (dpo, simpo), without evaluation",
        ),
    }
    for name, (until, text) in stages.items():
        command = commands.add_parser(name, help=text, description=text, epilog=SETTINGS_EPILOG)
        command.add_argument(
            "recipe", type=Path, help="YAML file, e.g. recipes/quick.yaml; its `name` is the run folder's"
        )
        command.add_argument(
            "--resume", action="store_true", help="continue the run that is there, if any (without this it is refused)"
        )
        add_trust_option(command)
        command.set_defaults(command=run, until=until, takes_settings=True)
    text = "the whole pipeline on the built-in world with a tiny model trained from nothing, on a CPU, with a report"
    command = commands.add_parser("demo", help=text, description=text, epilog=SETTINGS_EPILOG)
    command.add_argument("--fresh", action="store_true", help="delete an earlier demo run first")
    command.set_defaults(command=demo, takes_settings=True)
    command = commands.add_parser("settings", help="every setting of a recipe with its default")
    command.set_defaults(command=settings)


def add_run_commands(commands: Any) -> None:
    """Commands that read a finished run."""
    text = "write report.html and report.md of a run again"
    command = commands.add_parser("report", help=text, description=text)
    command.add_argument("run", type=Path, help=RUN)
    command.set_defaults(command=report)
    add_chat_command(commands)
    text = "actor beside reference with scores, from one set of weights: a few prompts at once"
    command = commands.add_parser("sample", help=text, description=text)
    command.add_argument("run", type=Path, help=RUN)
    command.add_argument("--prompt", action="append", help="a prompt (repeatable; default: held-out ones)")
    command.add_argument("--num-prompts", type=positive_int, default=3, help="how many held-out prompts (default: 3)")
    add_checkpoint_option(command)
    command.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    add_trust_option(command)
    command.set_defaults(command=sample)
    text = "write a run's policy or reward model as a folder that transformers, PEFT and vLLM load"
    command = commands.add_parser("export", help=text, description=text)
    command.add_argument("run", type=Path, help=RUN)
    command.add_argument("out", type=Path, help="folder to write; new or empty")
    formats = "the actor's adapter alone, the whole policy, or the reward model as a sequence classifier"
    command.add_argument("--format", choices=["peft", "merged", "reward-model"], required=True, help=formats)
    add_checkpoint_option(command)
    add_trust_option(command)
    command.set_defaults(command=export)


def run(args: argparse.Namespace) -> None:
    """`run` and the per-stage commands."""
    recipe = recipe_with_overrides(args.recipe, args.overrides)
    if recipe.model.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # the hub libraries read it once, when they are imported

    from hydra_rlhf.reporting.console import print_summary
    from hydra_rlhf.reporting.render import render_report
    from hydra_rlhf.stages.pipeline import run_recipe

    folder = run_recipe(recipe, resume=args.resume, until=args.until, trust_remote_code=args.trust_remote_code)
    print_summary(folder, report=render_report(folder))


def demo(args: argparse.Namespace) -> None:
    """`demo`: run it, take it up again, or show what it came to."""
    from hydra_rlhf.reporting.console import print_summary
    from hydra_rlhf.reporting.render import render_report
    from hydra_rlhf.runtime.run import delete_run
    from hydra_rlhf.stages.pipeline import run_recipe

    recipe = recipe_with_overrides(DEMO_RECIPE, args.overrides)
    folder = Path(recipe.output_dir) / recipe.name
    if args.fresh and (folder / "recipe.yaml").is_file():
        delete_run(folder)
    run_recipe(recipe, resume=True)
    print_summary(folder, report=render_report(folder))


def settings(args: argparse.Namespace) -> None:
    """`settings`: the recipe's fields as tyro shows them."""
    del args
    recipe_with_overrides(None, ["--help"])


def report(args: argparse.Namespace) -> None:
    """`report`: render it from the run folder alone."""
    from hydra_rlhf.reporting.render import render_report

    print(render_report(args.run))


def sample(args: argparse.Namespace) -> None:
    """`sample`: the same prompts answered with LoRA on and off."""
    from hydra_rlhf.reporting.console import print_samples
    from hydra_rlhf.stages.finished import sample_side_by_side

    print_samples(
        sample_side_by_side(
            args.run,
            prompts=args.prompt,
            num_prompts=args.num_prompts,
            checkpoint=args.checkpoint,
            seed=args.seed,
            trust_remote_code=args.trust_remote_code,
        )
    )


def export(args: argparse.Namespace) -> None:
    """`export`: write a run's result in a format others load."""
    from hydra_rlhf.stages.finished import export_run

    export_run(
        args.run,
        args.out,
        format=args.format,
        checkpoint=args.checkpoint,
        trust_remote_code=args.trust_remote_code,
    )
    print(args.out)


def recipe_with_overrides(source: "Path | Recipe | None", overrides: Sequence[str]) -> "Recipe":
    """A recipe, or the one of a file, or every setting's default (None), with command-line settings laid over it.
    Raises `ConfigError`."""
    import tyro
    from pydantic import ValidationError

    from hydra_rlhf.config import Recipe
    from hydra_rlhf.recipes import describe, load_recipe

    recipe = load_recipe(source) if isinstance(source, Path) else source or Recipe(name="my-run")
    if not overrides:
        return recipe
    try:
        # Without subcommands a source that the recipe lists is changed as `--ppo.reward.sources.0.weight 2`.
        plain = (tyro.conf.AvoidSubcommands,)
        return tyro.cli(Recipe, prog="hydra-rlhf run RECIPE", default=recipe, args=list(overrides), config=plain)
    except ValidationError as error:
        raise ConfigError("\n".join(describe(problem) for problem in error.errors())) from error


if __name__ == "__main__":
    program()
