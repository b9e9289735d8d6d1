"""Help texts: every command and every argument says what it is for."""

import argparse
from collections.abc import Iterator

from hydra_rlhf.cli import build_parser


def arguments(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    """Every argument below a parser, with the command it belongs to; commands too."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                yield f"{parser.prog} {choice.dest}", choice
            for below in action.choices.values():
                yield from arguments(below)
        else:
            yield parser.prog, action


def test_nothing_is_left_without_a_word():
    found = list(arguments(build_parser()))
    assert {"hydra-rlhf chat", "hydra-rlhf data check", "hydra-rlhf export"} <= {command for command, _ in found}
    assert [f"{command} {action.dest}" for command, action in found if not action.help] == []
