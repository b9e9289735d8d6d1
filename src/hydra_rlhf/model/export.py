"""Formats others can load: PEFT adapter folders, transformers folders, reward models. Safetensors and JSON only."""

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hydra_rlhf.errors import ModelError
from hydra_rlhf.model.heads import ScalarHead
from hydra_rlhf.model.lora import merge_into_linears, unwrap_linears
from hydra_rlhf.model.quantized import QuantizedBase, QuantizedLinear, unpack_linears
from hydra_rlhf.model.trunk import Trunk

REWARD_HEAD_FILE = "reward_head.safetensors"
ADAPTER_FOLDER = "adapter"
"""In a stage-1 folder of a quantised base: what stage 1 trained, in PEFT's format."""
STAGE1_ADAPTER = "stage1"
"""Name of the LoRA set that stage 1 trains."""


def save_stage1(folder: Path, trunk: Trunk, tokenizer: PreTrainedTokenizerBase, head: ScalarHead | None) -> None:
    """Write a stage-1 result: a transformers folder, its tokenizer, and the reward head where the stage has one.

    Of a quantised base not the weights: what is below all adapters (`adapter/`), and which base that belongs on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if trunk.quantized is None:
        trunk.save(folder)
    else:
        for name in trunk.switch.below:
            save_peft_adapter(trunk, name, folder / ADAPTER_FOLDER)
        trunk.quantized.write(folder, adapter=ADAPTER_FOLDER if trunk.switch.below else None)
    tokenizer.save_pretrained(folder)
    if head is not None:
        save_scalar_head(head, folder / REWARD_HEAD_FILE)


def save_scalar_head(head: ScalarHead, file: Path) -> None:
    """Write a reward or value head as {weight [h], bias []}."""
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in head.state_dict().items()}, file)


def load_scalar_head(file: Path) -> ScalarHead:
    """Read a head that `save_scalar_head` wrote. Raises `ModelError`."""
    tensors = read_safetensors(file)
    if set(tensors) != {"weight", "bias"} or tensors["weight"].dim() != 1:
        raise ModelError(f"{file} is not a scalar head: it holds {sorted(tensors)}, expected weight [h] and bias []")
    head = ScalarHead(len(tensors["weight"]))
    head.load_state_dict(tensors)
    return head


def load_reward_head(path: str, *, revision: str | None = None, offline: bool = False) -> ScalarHead | None:
    """The reward head that a model folder brings along: ours, or the `score` layer of a sequence classifier; else None.

    Raises `ModelError` for a classifier with more than one label.
    """
    file = Path(path) / REWARD_HEAD_FILE
    if file.is_file():
        return load_scalar_head(file)
    if QuantizedBase.read(Path(path)) is not None:
        return None  # an SFT model's adapter
    from transformers import AutoConfig, AutoModelForSequenceClassification

    options = {"revision": revision, "local_files_only": offline, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(path, **options)
        names = getattr(config, "architectures", None) or []
        if not any(name.endswith("ForSequenceClassification") for name in names):
            return None
        if config.num_labels != 1:
            raise ModelError(f"{path} classifies into {config.num_labels} labels; a reward model has one")
        model = AutoModelForSequenceClassification.from_pretrained(path, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as a reward model: {error}") from error
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear):
        raise ModelError(f"{path}: {type(model).__name__} has no linear `score` layer to take as reward head")
    head = ScalarHead(score.in_features)
    with torch.no_grad():
        head.weight.copy_(score.weight[0])
        if score.bias is not None:
            head.bias.copy_(score.bias[0])
    return head


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file. Raises `ModelError` where it is missing or damaged."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read as safetensors: {error}") from error


def save_peft_adapter(trunk: Trunk, adapter: str, folder: Path) -> None:
    """Write one LoRA set, on top of what is below it, as a folder that `peft.PeftModel.from_pretrained` loads onto the
    same base."""
    folder.mkdir(parents=True, exist_ok=True)
    prefix = trunk.model.base_model_prefix
    stacked, rank, alpha = as_one_adapter(trunk, tuple(dict.fromkeys((*trunk.switch.below, adapter))))
    tensors = {
        f"base_model.model.{prefix}.{name}.weight": tensor.contiguous().cpu() for name, tensor in stacked.items()
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name(trunk),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(is_transposed(linear.linear) for linear in trunk.lora_linears.values()),
        "target_modules": sorted({path.rsplit(".", 1)[-1] for path in trunk.lora_linears}),
        "inference_mode": True,
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def as_one_adapter(trunk: Trunk, names: tuple[str, ...]) -> tuple[dict[str, torch.Tensor], int, float]:
    """(tensors, rank, alpha) of one LoRA set that does what these do together.

    s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2]. A single one is returned as it is.
    """
    first = next(iter(trunk.lora_linears.values()))
    ranks = [len(first.lora_A[name]) for name in names]
    if len(names) == 1:
        tensors = {path: tensor.detach() for path, tensor in trunk.adapter_parameters(names[0]).items()}
        return tensors, ranks[0], first.scale[names[0]] * ranks[0]
    stacked: dict[str, torch.Tensor] = {}
    for path, linear in trunk.lora_linears.items():
        stacked[f"{path}.lora_A"] = torch.cat([linear.lora_A[name].float() for name in names])
        stacked[f"{path}.lora_B"] = torch.cat([linear.scale[n] * linear.lora_B[n].float() for n in names], dim=1)
    return stacked, sum(ranks), float(sum(ranks))


def is_transposed(linear: nn.Module) -> bool:
    """Whether the plain form of a linear stores its weight as [in, out], as transformers' `Conv1D` does."""
    kind = linear.kind if isinstance(linear, QuantizedLinear) else type(linear)
    return not issubclass(kind, nn.Linear)


def base_name(trunk: Trunk) -> str | None:
    """Where a trunk's weights are: a hub name, a whole path of a folder, None for weights that were never written."""
    name = trunk.model.config.name_or_path
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name or None


def load_peft_adapter(trunk: Trunk, adapter: str, folder: Path) -> None:
    """Read a PEFT LoRA folder onto a trunk under the name `adapter`.

    Raises `ModelError` for anything but plain LoRA in safetensors, and for tensors that do not fit the trunk.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} has no readable adapter_config.json: {error}") from error
    refuse_unsupported(config, folder)
    tensors = read_safetensors(folder / "adapter_model.safetensors")
    prefix = f"base_model.model.{trunk.model.base_model_prefix}."
    by_name = {name.removeprefix(prefix).removesuffix(".weight"): tensor for name, tensor in tensors.items()}
    paths = tuple(sorted({name.rpartition(".")[0] for name in by_name}))
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    if config.get("use_rslora"):
        alpha *= math.sqrt(rank)
    dtype = next(iter(tensors.values())).dtype
    trunk.add_adapter(adapter, rank=rank, alpha=alpha, targets=paths, dtype=dtype, seed_of=lambda _: 0)
    copy_adapter(trunk, adapter, by_name, folder)


def refuse_unsupported(config: Mapping[str, Any], folder: Path) -> None:
    """Raise `ModelError` for a PEFT config that means something other than W + (alpha / r) B A."""
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder}: peft_type={config.get('peft_type')!r}; only LORA adapters are read")
    changed = [key for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern") if config.get(key)]
    if config.get("bias", "none") != "none":
        changed.append("bias")
    if changed:
        raise ModelError(
            f"{folder}: {', '.join(changed)} in adapter_config.json cannot be read; merge it with peft first"
        )


@torch.no_grad()
def copy_adapter(trunk: Trunk, adapter: str, tensors: Mapping[str, torch.Tensor], source: Path) -> None:
    """Copy {path.lora_A | path.lora_B: tensor} into a LoRA set. Raises `ModelError` naming what does not fit."""
    parameters = trunk.adapter_parameters(adapter)
    if set(parameters) != set(tensors):
        odd = sorted(set(parameters) ^ set(tensors))[:3]
        raise ModelError(
            f"{source} does not fit this model's LoRA set: {', '.join(odd)}, ...; lora.targets must be the same"
        )
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise ModelError(f"{source}: {name} is {tuple(tensors[name].shape)}, here it is {tuple(parameter.shape)}")
        parameter.copy_(tensors[name])


def save_merged(trunk: Trunk, adapter: str | None, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the policy as a plain transformers folder; the adapter is merged into a copy, not the shared base."""
    folder.mkdir(parents=True, exist_ok=True)
    merged_copy(trunk, adapter).save(folder)
    tokenizer.save_pretrained(folder)


def merged_copy(trunk: Trunk, adapter: str | None) -> Trunk:
    """The model that a pass with `adapter` (None = LoRA off) runs, as plain weights in storage of its own."""
    merged = copy.deepcopy(trunk)
    unpack_linears(merged.model)
    stack = dict.fromkeys((*trunk.switch.below, *(() if adapter is None else (adapter,))))
    if stack:
        merge_into_linears(merged.lora_linears, *stack)
    unwrap_linears(merged.decoder, merged.lora_linears)
    merged.lora_linears, merged.quantized, merged.switch.below = {}, None, ()
    merged.model.requires_grad_(False)
    return merged


def save_reward_model(trunk: Trunk, head: ScalarHead, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write LoRA-off trunk and reward head as a folder for `AutoModelForSequenceClassification`.

    Such models have no bias on their score layer. The head's bias (minus the mean score of chosen responses) is written
    to config.json as `reward_bias`: `logits + reward_bias` is the score; differences are equal without it. Raises
    `ModelError` where the family has no sequence classifier.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(trunk.model.config)
    config.num_labels = 1
    config.pad_token_id = tokenizer.pad_token_id
    config.reward_bias = head.bias.item()
    try:
        model = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise ModelError(f"{type(trunk.model).__name__} has no sequence classifier in transformers: {error}") from error
    plain = merged_copy(trunk, None)
    model.base_model.load_state_dict(plain.decoder.state_dict())
    with torch.no_grad():
        model.score.weight.copy_(head.weight[None])
    folder.mkdir(parents=True, exist_ok=True)
    model.to(dtype=next(plain.decoder.parameters()).dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
