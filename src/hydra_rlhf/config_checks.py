"""Types of values and checks across settings, apart from `config.py` so that it lists nothing but settings."""

import re
from typing import TYPE_CHECKING, Annotated, Literal

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

GROUP_ESTIMATORS = ("rloo", "grpo", "dr-grpo")
"""Values of `ppo.advantage_estimator` that compare the responses to one prompt with each other."""
LOSS_KL_ESTIMATORS = ("grpo", "dr-grpo")
"""Those that have the KL in the loss, as k3, unless the settings say otherwise."""
TOKEN_ESTIMATORS = ("gae", "reinforce++")
"""Those that discount what is still to come; the others take a response's rewards as one sum."""

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


def compares_with_greedy(config: "PPOConfig") -> bool:
    """Whether each prompt is answered greedily too, as a baseline that nothing is learned from."""
    return config.advantage_estimator == "remax"


def kl_place(config: "PPOConfig") -> Literal["reward", "loss"]:
    """Where the KL is taken in: as set, else in the reward, and in the loss for estimators that have it there."""
    return config.kl_in or ("loss" if config.advantage_estimator in LOSS_KL_ESTIMATORS else "reward")


def kl_estimator(config: "PPOConfig") -> Literal["k1", "k2", "k3", "none"]:
    """The per-token KL: as set, else k1 in the reward, k2 in the loss, and k3 for estimators that have it there."""
    in_loss = "k3" if config.advantage_estimator in LOSS_KL_ESTIMATORS else "k2"
    return config.kl_estimator or ("k1" if kl_place(config) == "reward" else in_loss)


def check_ppo(config: "PPOConfig") -> None:
    """Raise `ConfigError` where two PPO settings contradict each other."""
    check_estimator(config)
    num_sequences = config.rollout_batch_size * config.samples_per_prompt
    if num_sequences % config.minibatch_size:
        at_most = min(config.minibatch_size, num_sequences)
        suggestion = max(size for size in range(1, at_most + 1) if num_sequences % size == 0)
        raise ConfigError(
            f"ppo.minibatch_size={config.minibatch_size} does not divide ppo.rollout_batch_size * "
            f"ppo.samples_per_prompt = {num_sequences}; try ppo.minibatch_size={suggestion}"
        )
    if kl_place(config) == "loss" and config.kl_estimator == "k1":
        raise ConfigError(
            "ppo.kl_estimator=k1 with the KL in the loss (ppo.kl_in) does nothing: the gradient of "
            "E[log pi - log pi_ref] through the sampled tokens is zero in expectation; use k2 or k3 there, or "
            "ppo.kl_in=reward"
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


def check_estimator(config: "PPOConfig") -> None:
    """Raise `ConfigError` for settings that the advantage estimator cannot work with, or has no use for."""
    name = config.advantage_estimator
    if name in GROUP_ESTIMATORS and config.samples_per_prompt < 2:
        raise ConfigError(
            f"ppo.samples_per_prompt={config.samples_per_prompt}: ppo.advantage_estimator={name} compares the "
            "responses to one prompt with each other; set ppo.samples_per_prompt to 2 or more (a lower "
            "ppo.rollout_batch_size keeps the number of sequences), or use remax or reinforce++"
        )
    if name != "gae" and config.critic_warmup_steps:
        raise ConfigError(
            f"ppo.critic_warmup_steps={config.critic_warmup_steps}: ppo.advantage_estimator={name} has no critic to "
            "warm up; set ppo.critic_warmup_steps=0"
        )
    if name not in TOKEN_ESTIMATORS and config.discount != 1.0:
        raise ConfigError(
            f"ppo.discount={config.discount}: ppo.advantage_estimator={name} takes the rewards of a response as one "
            f"sum; set ppo.discount=1, or use {' or '.join(TOKEN_ESTIMATORS)}"
        )
