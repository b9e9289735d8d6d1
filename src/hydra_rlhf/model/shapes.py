"""Models as shapes alone: known ones by name, any other from its config, built on the meta device without a weight."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_utils import PreTrainedModel

from hydra_rlhf.config import ModelConfig
from hydra_rlhf.errors import ModelError
from hydra_rlhf.model.device import dtype_of, pick_device
from hydra_rlhf.model.load import (
    SCRATCH_SHAPES,
    UNREADABLE,
    attention_implementation,
    first_line,
    pinned_revision,
    quantize_linears,
    to_dtype,
    without_dropout,
)
from hydra_rlhf.model.lora import find_linears
from hydra_rlhf.model.quantized import QuantizedLinear, can_pack
from hydra_rlhf.model.trunk import Trunk, text_config
from hydra_rlhf.runtime.meta_ops import KNOWN, MetaBytes

SHAPE = "shape:"
RANDOM_STD = 0.02
"""Of random weights that are packed at once; those of other tensors are the family's own."""


def llama(
    hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool = False
) -> dict[str, Any]:
    """A Llama's config."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
    }


SHAPES: Mapping[str, dict[str, Any]] = {
    "smollm2-135m": llama(576, 1536, 30, 9, 3, 49152, tied=True),
    "smollm2-360m": llama(960, 2560, 32, 15, 5, 49152, tied=True),
    "llama-3.2-1b": llama(2048, 8192, 16, 32, 8, 128256, tied=True),
    "llama-3.2-3b": llama(3072, 8192, 28, 24, 8, 128256, tied=True),
    "llama-2-7b": llama(4096, 11008, 32, 32, 32, 32000),
    "llama-3-8b": llama(4096, 14336, 32, 32, 8, 128256),
    "llama-2-13b": llama(5120, 13824, 40, 40, 40, 32000),
    "opt-1.3b": {
        "model_type": "opt",
        "hidden_size": 2048,
        "ffn_dim": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "vocab_size": 50272,
        "word_embed_proj_dim": 2048,
    },
    "gpt2": {"model_type": "gpt2"},
}
"""Published shapes of well-known models; `plan` and `bench` take them as `shape:NAME` where no config is at hand."""
ALIASES: Mapping[str, str] = {
    "llama-7b": "llama-2-7b",
    "llama-13b": "llama-2-13b",
    "llama-8b": "llama-3-8b",
    "llama-1b": "llama-3.2-1b",
    "llama-3b": "llama-3.2-3b",
    "smollm-135m": "smollm2-135m",
    "smollm-360m": "smollm2-360m",
}
"""Other names of these shapes."""


def find_config(config: ModelConfig, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of `model.path`: a hub name, a folder, `scratch:NAME` or `shape:NAME`. Raises `ModelError`.

    Reads no weight, and runs code of the model's repository only if the caller says so. A `scratch:` model has as many
    tokens as `model.scratch_vocab_size`.
    """
    path = config.path
    if path.startswith("scratch:") and (shape := SCRATCH_SHAPES.get(path.removeprefix("scratch:"))):
        known = {"model_type": "llama", "vocab_size": config.scratch_vocab_size, "tie_word_embeddings": True, **shape}
    elif path.startswith(SHAPE):
        name = path.removeprefix(SHAPE)
        known = SHAPES.get(ALIASES.get(name, name))
    else:
        try:
            found = AutoConfig.from_pretrained(
                path,
                revision=pinned_revision(path, config),
                local_files_only=config.offline,
                trust_remote_code=trust_remote_code,
            )
            if trust_remote_code:  # the classes of the repository are known to transformers from here on
                with torch.device("meta"):
                    AutoModelForCausalLM.from_config(with_layers(found, 1), trust_remote_code=trust_remote_code)
            return found
        except UNREADABLE as error:
            hint = f"; known shapes are {known_shapes()}"
            raise ModelError(
                f"model.path={path!r} has no config that can be read: {first_line(error)}{hint}"
            ) from error
    if known is None:
        raise ModelError(f"model.path={path!r} is unknown; there are {known_shapes()}")
    known = dict(known)
    return AutoConfig.for_model(known.pop("model_type"), **known)


def known_shapes() -> str:
    """The names of all shapes, short ones too."""
    return ", ".join(SHAPE + name for name in sorted({*SHAPES, *ALIASES}))


def with_layers(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """A copy of a config with at most `num_layers` layers, and dropout off."""
    config = type(config).from_dict(config.to_dict())
    without_dropout(config)
    text = text_config(config)
    text.num_hidden_layers = min(num_layers, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    return config


def meta_trunk(config: PretrainedConfig, model: ModelConfig, *, num_layers: int | None = None) -> Trunk:
    """The model of a config on the meta device, with `num_layers` layers instead of its own."""
    config = with_layers(config, num_layers or text_config(config).num_hidden_layers)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config, attn_implementation=attention_implementation(config))
    with MetaBytes(KNOWN):  # the weights of all layers have the same few shapes
        trunk = Trunk(to_dtype(built, dtype_of(model)))
        if model.quantization != "none":
            quantize_linears(trunk, model.quantization)
    return trunk


@dataclass(frozen=True, slots=True)
class _Model:
    """What a model as shapes depends on."""

    config_json: str
    model: ModelConfig
    config: PretrainedConfig = field(compare=False)


def whole_trunk(config: PretrainedConfig, model: ModelConfig) -> Trunk:
    """The model of a config at its full depth on the meta device, made once in a process: only to be looked at."""
    return _whole_trunk(_Model(config.to_json_string(use_diff=False), model, config))


@lru_cache(maxsize=16)
def _whole_trunk(model: _Model) -> Trunk:
    return meta_trunk(model.config, model.model)


def layer_period(trunk: Trunk) -> int:
    """After how many layers their kinds repeat, 1 where all are alike; the number of layers where they never do."""
    layers = trunk.layers()
    types = getattr(text_config(trunk.model.config), "layer_types", None) or [""] * len(layers)
    kinds = [
        (kind, *((name, type(m), *(p.shape for p in m.parameters(recurse=False))) for name, m in layer.named_modules()))
        for kind, layer in zip(types, layers, strict=True)
    ]
    return next(n for n in range(1, len(kinds) + 1) if kinds[n:] == kinds[:-n])


def random_trunk(config: PretrainedConfig, model: ModelConfig) -> Trunk:
    """The model of a config with random weights, for measuring: sizes matter, numbers do not.

    Every tensor is made where it stays, in the dtype it keeps; of packed linears one at a time exists unpacked.
    """
    device, dtype = pick_device(model.device), dtype_of(model)
    options = {"attn_implementation": attention_implementation(config), "dtype": dtype}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        if model.quantization == "none":
            with device:
                built = AutoModelForCausalLM.from_config(config, **options)
        else:
            with torch.device("meta"):
                built = AutoModelForCausalLM.from_config(config, **options)
            pack_random_linears(built.base_model, model.quantization, device)
            materialise(built, device)
    return Trunk(to_dtype(built, dtype))


@torch.no_grad()
def pack_random_linears(decoder: nn.Module, format: str, device: torch.device) -> None:
    """Give a decoder on the meta device packed linears with random weights on `device`, made one after the other."""
    for path in list(find_linears(decoder, ("all-linear",))):  # a list of names keeps no linear alive
        linear = decoder.get_submodule(path)
        if not can_pack(linear):
            continue
        linear.to_empty(device=device)
        for parameter in linear.parameters():
            parameter.normal_(std=RANDOM_STD)
        decoder.set_submodule(path, QuantizedLinear.from_linear(linear, format))


def materialise(model: PreTrainedModel, device: torch.device) -> None:
    """Put what is on the meta device on `device`, with the family's own initial numbers; what is tied stays tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
                setattr(module, name, made[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device=device))
    model.initialize_weights()
