"""`hydra-rlhf data`: what a data file holds and what is wrong with it. Loads no torch."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydra_rlhf.config import Recipe


def add_data_command(commands: Any, *, read_recipe: Callable[[None, Sequence[str]], "Recipe"]) -> None:
    """The command's parser; `read_recipe` lays settings over the defaults."""
    command = commands.add_parser("data", help="what a data file holds and what is wrong with it")
    actions = command.add_subparsers(required=True, metavar="ACTION")
    text = "what would be read, lengths, the longer-wins baseline, all problems"
    epilog = "Settings of data can be given too, e.g. --data.format pairs --data.columns prompt question."
    check = actions.add_parser("check", help=text, description=text, epilog=epilog)
    check.add_argument("file", help="local file, hub name, or `world` for the built-in one")
    check.add_argument("--tokenizer", default=None, help="model folder or hub name, to count tokens too")
    check.set_defaults(command=partial(data_check, read_recipe), takes_settings=True)
    formats = actions.add_parser("formats", help="the row formats that can be named in data.format")
    formats.set_defaults(command=data_formats)


def data_check(read_recipe: Callable[[None, Sequence[str]], "Recipe"], args: argparse.Namespace) -> None:
    """`data check`: exit code 2 where a row is malformed."""
    from hydra_rlhf.data.check import check_file, render_report

    recipe = read_recipe(None, args.overrides)
    tokenizer = None
    if args.tokenizer is not None:
        from hydra_rlhf.config import ModelConfig
        from hydra_rlhf.model.load import load_tokenizer

        tokenizer = load_tokenizer(args.tokenizer, ModelConfig())
    checked = check_file(args.file, recipe.data, tokenizer, seed=recipe.seed)
    print(render_report(checked))
    if not checked.ok:
        raise SystemExit(2)


def data_formats(args: argparse.Namespace) -> None:
    """`data formats`: names and what each looks like."""
    from hydra_rlhf.data.row_formats import FORMATS

    del args
    for name, row_format in FORMATS.items():
        print(f"{name:24} {row_format.description}")
