"""Memory-efficient RLHF: actor, critic, reference and reward model on one shared base (arXiv 2309.00754).

    from hydra_rlhf import HydraModel, PPOConfig, load_pairs, train_hydra_sft, train_ppo

Names are loaded when they are first used, so that importing the package stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydra_rlhf.api import save_model, train_hydra_sft, train_ppo, train_preferences
    from hydra_rlhf.config import (
        DataConfig,
        EvaluationConfig,
        HydraSFTConfig,
        LoraConfig,
        ModelConfig,
        PPOConfig,
        PreferenceConfig,
        Recipe,
        RewardConfig,
        SamplingConfig,
        SupervisedConfig,
    )
    from hydra_rlhf.data.sources import PreferencePair, Prompt, load_demonstrations, load_pairs, load_prompts
    from hydra_rlhf.errors import HydraError
    from hydra_rlhf.model.hydra import HydraModel
    from hydra_rlhf.model.roles import ROLES, Role
    from hydra_rlhf.recipes import load_recipe
    from hydra_rlhf.reporting.render import render_report
    from hydra_rlhf.stages.pipeline import run_recipe

__version__ = "0.1.0"

_HOME = {
    "DataConfig": "config",
    "EvaluationConfig": "config",
    "HydraError": "errors",
    "HydraModel": "model.hydra",
    "HydraSFTConfig": "config",
    "LoraConfig": "config",
    "ModelConfig": "config",
    "PPOConfig": "config",
    "PreferenceConfig": "config",
    "PreferencePair": "data.sources",
    "Prompt": "data.sources",
    "ROLES": "model.roles",
    "Recipe": "config",
    "RewardConfig": "config",
    "Role": "model.roles",
    "SamplingConfig": "config",
    "SupervisedConfig": "config",
    "load_demonstrations": "data.sources",
    "load_pairs": "data.sources",
    "load_prompts": "data.sources",
    "load_recipe": "recipes",
    "render_report": "reporting.render",
    "run_recipe": "stages.pipeline",
    "save_model": "api",
    "train_hydra_sft": "api",
    "train_ppo": "api",
    "train_preferences": "api",
}

__all__ = [  # noqa: RUF022 - in the order of _HOME
    "DataConfig",
    "EvaluationConfig",
    "HydraError",
    "HydraModel",
    "HydraSFTConfig",
    "LoraConfig",
    "ModelConfig",
    "PPOConfig",
    "PreferenceConfig",
    "PreferencePair",
    "Prompt",
    "ROLES",
    "Recipe",
    "RewardConfig",
    "Role",
    "SamplingConfig",
    "SupervisedConfig",
    "load_demonstrations",
    "load_pairs",
    "load_prompts",
    "load_recipe",
    "render_report",
    "run_recipe",
    "save_model",
    "train_hydra_sft",
    "train_ppo",
    "train_preferences",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
