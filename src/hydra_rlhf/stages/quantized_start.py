"""What a recipe with packed weights, or with an optimizer in 8 bits, must fulfil; asked before anything is loaded."""

from collections.abc import Collection
from pathlib import Path

from hydra_rlhf.config import OptimizerConfig, Recipe, StartConfig
from hydra_rlhf.errors import ConfigError, ModelError
from hydra_rlhf.model.quantized import QuantizedBase
from hydra_rlhf.model.roles import TRAINABLE_ROLES, RoleTable
from hydra_rlhf.runtime.extras import load_bitsandbytes


def check_packages(recipe: Recipe, stages: Collection[str]) -> None:
    """Raise `ConfigError` where these stages, or the base, need bitsandbytes and it is not installed."""
    if recipe.model.quantization == "nf4":
        load_bitsandbytes("model.quantization=nf4")
    for stage in stages:
        config: OptimizerConfig = getattr(recipe, stage)
        if config.optimizer == "adamw-8bit":
            load_bitsandbytes(f"{stage}.optimizer={config.optimizer}")


def check_quantization(recipe: Recipe, table: RoleTable, trained: Collection[str], *, loads_base: bool) -> None:
    """Raise `ConfigError` where packed weights would have to be trained. `trained` are the stages before PPO that this
    recipe runs, `loads_base` says whether they start from `model.path`."""
    if recipe.model.quantization == "none":
        return
    setting = f"model.quantization={recipe.model.quantization}"
    if loads_base and recipe.model.path.startswith("scratch:"):
        raise ConfigError(
            f"{setting} packs the weights of a trained model, but model.path={recipe.model.path} begins with random "
            "ones; name a model, or use model.quantization=none"
        )
    whole = [role for role in TRAINABLE_ROLES if role in table and table[role].adapter is None]
    if whole:
        raise ConfigError(
            f"{setting}: packed weights are never trained, but method={recipe.method} trains the whole of its "
            f"{' and '.join(whole)}; choose a method with LoRA sets, e.g. method=hydra-ppo"
        )
    full = [stage for stage in trained if getattr(recipe, stage).tuning == "full"]
    if full:
        remedy = " and ".join(f"{stage}.tuning=lora" for stage in full)
        raise ConfigError(f"{setting}: packed weights are never trained, stage 1 trains a LoRA set; use {remedy}")


def check_start_base(start: StartConfig, path: str, revision: str | None) -> None:
    """Raise `ModelError` for a start whose adapter was trained on another model than `path` at `revision`."""
    here = str(Path(path).resolve()) if Path(path).is_dir() else path
    for stage in ("sft", "reward_model", "hydra_sft"):
        folder: str | None = getattr(start, stage)
        found = None if folder is None else QuantizedBase.read(Path(folder))
        if found is not None and (found[0].path, found[0].revision) != (here, revision):
            base = found[0]
            pinned = "" if base.revision is None else f" model.revision={base.revision}"
            raise ModelError(
                f"start.{stage}={folder} holds an adapter for {base.path}, not for model.path={path}; "
                f"use model.path={base.path}{pinned}, or another start"
            )
