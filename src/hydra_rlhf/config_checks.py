"""Types of values and checks across settings, apart from `config.py` so that it lists nothing but settings."""

import re
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, ConfigDict, Field

from hydra_rlhf.errors import ConfigError

if TYPE_CHECKING:
    from hydra_rlhf.config_stages import PPOConfig

Count = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(gt=0)]
LARGEST = 1e30
"""Numbers in settings meet float32 tensors."""
Positive = Annotated[float, Field(gt=0, le=LARGEST, allow_inf_nan=False)]
Finite = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Betas = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}

STRICT = ConfigDict(extra="forbid")
"""Config classes refuse unknown fields."""


def parse_bytes(text: str) -> int:
    """`24GiB` -> bytes. Raises `ConfigError` for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]i?B|B)", text)
    if found is None:
        raise ConfigError(f"{text!r} is not a number of bytes; write it as 24GiB, 512MiB or 1000000B")
    return int(float(found[1]) * UNITS[found[2]])


def check_bytes(text: str) -> str:
    """The text, if it is a number of bytes above zero. Raises `ValueError`, which pydantic reports with the setting."""
    try:
        num_bytes = parse_bytes(text)
    except ConfigError:
        num_bytes = 0
    if num_bytes < 1:
        raise ValueError("not a number of bytes above zero; write it as 24GiB, 512MiB or 1000000B")
    return text


def check_bytes_or_auto(text: str) -> str:
    """As `check_bytes`, or `auto`."""
    return text if text == "auto" else check_bytes(text)


Bytes = Annotated[str, AfterValidator(check_bytes)]
BytesOrAuto = Annotated[str, AfterValidator(check_bytes_or_auto)]


def check_ppo(config: "PPOConfig") -> None:
    """Raise `ConfigError` where two PPO settings contradict each other."""
    num_sequences = config.rollout_batch_size * config.samples_per_prompt
    if num_sequences % config.minibatch_size:
        at_most = min(config.minibatch_size, num_sequences)
        suggestion = max(size for size in range(1, at_most + 1) if num_sequences % size == 0)
        raise ConfigError(
            f"ppo.minibatch_size={config.minibatch_size} does not divide ppo.rollout_batch_size * "
            f"ppo.samples_per_prompt = {num_sequences}; try ppo.minibatch_size={suggestion}"
        )
    if config.kl_in == "loss" and config.kl_estimator == "k1":
        raise ConfigError(
            "ppo.kl_estimator=k1 with ppo.kl_in=loss does nothing: the gradient of E[log pi - log pi_ref] through the "
            "sampled tokens is zero in expectation; use k2 or k3 there, or ppo.kl_in=reward"
        )
    if config.kl_estimator == "none" and config.kl_target is not None:
        raise ConfigError(
            f"ppo.kl_target={config.kl_target} needs a KL term, but ppo.kl_estimator=none; remove one of them"
        )
    if config.kl_target is not None and num_sequences >= 5 * config.kl_horizon:
        raise ConfigError(
            f"ppo.kl_horizon={config.kl_horizon} is too short for {num_sequences} sequences a step: the coefficient "
            f"could become negative; use at least {num_sequences // 5 + 1}"
        )
    if config.sampling.min_response_tokens > config.sampling.max_response_tokens:
        raise ConfigError(
            f"ppo.sampling.min_response_tokens={config.sampling.min_response_tokens} is above "
            f"ppo.sampling.max_response_tokens={config.sampling.max_response_tokens}; lower it"
        )
    if config.reward.reward_model_coef == 0 and config.reward.reward_fn is None and not config.reward.sources:
        raise ConfigError(
            "ppo.reward.reward_model_coef=0 leaves no score at all; name a ppo.reward.reward_fn, or list some "
            "ppo.reward.sources"
        )
