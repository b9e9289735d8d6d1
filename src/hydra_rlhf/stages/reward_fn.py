"""Reward functions of the user: import them, call them, check what they return."""

import importlib
import inspect
import math
import os
import reprlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hydra_rlhf.errors import ConfigError, RewardFunctionError
from hydra_rlhf.records import PromptBatch, Responses

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


def call_reward_fn(
    reward_fn: RewardFunction, prompts: PromptBatch, responses: Responses
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b r"]]:
    """Scores [b] and per-token rewards [b, r] (zero for a function that returns one float per response).

    A list per response must have one entry per response token, the stop token included: as many as the ids that a
    function gets if it takes `response_ids`. Raises `RewardFunctionError`.
    """
    mask = responses.batch.response_mask
    lengths = mask.sum(dim=1).tolist()
    try:
        returned = list(reward_fn(prompts.texts, responses.texts, **accepted_columns(reward_fn, prompts, responses)))
    except Exception as error:
        raise RewardFunctionError(f"the reward function raised {type(error).__name__}: {error}") from error
    if len(returned) != len(responses.texts):
        raise RewardFunctionError(
            f"the reward function returned {len(returned)} values for {len(responses.texts)} responses"
        )
    dense = torch.zeros(mask.shape)
    scores = torch.zeros(len(returned))
    for i, value in enumerate(returned):
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != lengths[i]:
                raise RewardFunctionError(f"row {i}: {len(value)} token rewards for {lengths[i]} response tokens")
            per_token = [checked_number(x, i) for x in value]
            dense[i, : lengths[i]] = torch.tensor(per_token)
            scores[i] = checked_number(sum(per_token), i)
        else:
            scores[i] = checked_number(value, i)
    return scores.to(mask.device), dense.to(mask.device)


def accepted_columns(reward_fn: RewardFunction, prompts: PromptBatch, responses: Responses) -> dict[str, list[Any]]:
    """The data's columns and `response_ids` (token ids, the stop token included), as far as the function takes them."""
    mask, tokens = responses.batch.response_mask, responses.batch.tokens[:, responses.batch.num_prompt_columns :]
    ids = [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
    return columns_taken(reward_fn, {**prompts.columns, "response_ids": ids})


def columns_taken(reward_fn: RewardFunction, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Those of the columns that are parameters of the function; all for one that takes any keyword."""
    parameters = inspect.signature(reward_fn).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return columns
    return {name: column for name, column in columns.items() if name in parameters}


def checked_number(value: Any, row: int) -> float:
    """A float that float32 can hold, or `RewardFunctionError` saying which response got something else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RewardFunctionError(f"row {row}: the reward function returned {value!r}, not a number") from None
    except OverflowError:
        number = math.inf
    if isinstance(value, str) or not abs(number) <= torch.finfo(torch.float32).max:
        shown = reprlib.repr(value)
        raise RewardFunctionError(f"row {row}: the reward function returned {shown}; a finite float32 is needed")
    return number
