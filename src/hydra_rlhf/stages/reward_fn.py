"""Reward functions of the user: import them, call them. Imports no torch, for the process of an isolated one."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from hydra_rlhf.errors import ConfigError
from hydra_rlhf.stages.scoring.outcomes import Outcome, ScoreRequest, all_failed, check_returned

RewardFunction = Callable[..., Sequence[float] | Sequence[Sequence[float]]]
"""`(prompts, responses, **columns) -> one float per response, or one list of per-token floats per response`."""


def load_reward_fn(name: str | None) -> RewardFunction | None:
    """The reward function of a recipe, if it names one. Raises `ConfigError`."""
    return None if name is None else import_function(name, setting=f"ppo.reward.reward_fn={name!r}")


def import_function(name: str, *, setting: str) -> RewardFunction:
    """Import a function named `module:function`; the working folder is searched too.

    Raises `ConfigError` that begins with `setting`.
    """
    module_name, separator, function_name = name.partition(":")
    if not separator or not function_name:
        raise ConfigError(f"{setting} is not of the form module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise ConfigError(f"{setting} cannot be imported: {error}") from error
    if not callable(function):
        raise ConfigError(f"{setting} is a {type(function).__name__}, not a function")
    return function  # pyright: ignore[reportReturnType]


def call_reward_fn(reward_fn: RewardFunction, request: ScoreRequest) -> list[Outcome]:
    """What a reward function makes of the responses; what it raises is a failure of them all.

    It gets the data's columns and `response_ids` as far as it takes them. A list per response must have one entry per
    response token, the stop token included: as many as its ids.
    """
    columns = columns_taken(reward_fn, {**request.columns, "response_ids": request.response_ids})
    try:
        # A generator runs only when it is read, and may raise then.
        return check_returned(reward_fn(request.prompts, request.responses, **columns), request.lengths)
    except (Exception, SystemExit) as error:
        return all_failed(f"raised {type(error).__name__}: {error}", len(request.responses))


def columns_taken(reward_fn: RewardFunction, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Those of the columns that are parameters of the function; all for one that takes any keyword."""
    names = names_taken(reward_fn)
    return columns if names is None else {name: column for name, column in columns.items() if name in names}


def names_taken(reward_fn: RewardFunction) -> list[str] | None:
    """The names of a function's parameters; None for one that takes any keyword."""
    parameters = inspect.signature(reward_fn).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return list(parameters)
