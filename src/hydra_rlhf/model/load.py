"""Make a trunk: load a transformers model and its tokenizer, or build a small one from nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hydra_rlhf.config import ModelConfig
from hydra_rlhf.errors import ModelError
from hydra_rlhf.model import attention
from hydra_rlhf.model.device import DTYPES as DTYPES
from hydra_rlhf.model.device import dtype_of, with_dtype
from hydra_rlhf.model.device import pick_device as pick_device
from hydra_rlhf.model.export import STAGE1_ADAPTER, load_peft_adapter
from hydra_rlhf.model.lora import find_linears
from hydra_rlhf.model.probe import check_trunk
from hydra_rlhf.model.quantized import QuantizedBase, QuantizedLinear, can_pack
from hydra_rlhf.model.trunk import Trunk, text_config

UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, StrictDataclassError)
"""What transformers and the hub raise for files that are missing, damaged, or hold other types than they should."""

SCRATCH_SHAPES: Mapping[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 112,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 304,
    },
    "small": {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 688,
    },
}
"""Llama shapes that `scratch:` models are built with."""


def to_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the weights, as `from_pretrained` does; buffers such as rotary frequencies stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def load_trunk(path: str, config: ModelConfig, *, trust_remote_code: bool = False) -> Trunk:
    """Load a causal LM from a hub name or a local folder, in `config.dtype`, with dropout off and its linears packed as
    `config.quantization` says. A folder that stage 1 left of a quantised base is that base with its adapter below.

    Only safetensors are read, and code from the model's repository runs only if the caller says so: a model's own
    files are never asked. Raises `ModelError` with the reason and the way out.
    """
    config = with_dtype(config)
    left_by_stage1 = QuantizedBase.read(Path(path))
    if left_by_stage1 is None:
        return load_base(path, config, revision=pinned_revision(path, config), trust_remote_code=trust_remote_code)
    base, adapter = left_by_stage1
    refuse_other_packing(base, path, config)
    revision = base.commit or base.revision
    trunk = load_base(base.path, config, revision=revision, trust_remote_code=trust_remote_code)
    trunk.quantized = base
    if adapter is not None:
        load_peft_adapter(trunk, STAGE1_ADAPTER, adapter)
        trunk.keep_below(STAGE1_ADAPTER)
    return trunk


def refuse_other_packing(base: QuantizedBase, folder: str, config: ModelConfig) -> None:
    """Raise `ModelError` where an adapter was trained on weights other than these settings make."""
    for setting, then, now in (
        ("quantization", base.quantization, config.quantization),
        ("dtype", base.dtype, config.dtype),
    ):
        if then != now:
            raise ModelError(
                f"model.{setting}={now}, but {folder} holds an adapter that was trained on {base.path} with "
                f"model.{setting}={then}; use that, or another start"
            )


def load_base(path: str, config: ModelConfig, *, revision: str | None, trust_remote_code: bool) -> Trunk:
    """The model of a hub name or a local folder, without any adapter. Raises `ModelError`."""
    local = Path(path)
    if local.is_dir() and not any(local.glob("*.safetensors")):
        raise ModelError(f"{path} holds no .safetensors file; other weight formats are not read, convert it first")
    options = {
        "revision": revision,
        "local_files_only": config.offline,
        "trust_remote_code": trust_remote_code,
    }
    try:
        model_config = AutoConfig.from_pretrained(path, **options)
        without_dropout(model_config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=model_config,
            dtype=DTYPES[config.dtype],
            use_safetensors=True,
            attn_implementation=attention_implementation(model_config),
            output_loading_info=True,
            **options,
        )
    except UNREADABLE as error:
        raise ModelError(f"model.path={path!r} cannot be loaded as a causal LM: {first_line(error)}") from error
    model, report = loaded
    trunk, device = Trunk(model), pick_device(config.device)
    refuse_missing(trunk, set(report["missing_keys"]), path)
    if config.quantization != "none":
        trunk.quantized = QuantizedBase(
            path=str(local.resolve()) if local.is_dir() else path,
            revision=revision,
            commit=getattr(model.config, "_commit_hash", None),
            quantization=config.quantization,
            dtype=config.dtype,
        )
        quantize_linears(trunk, config.quantization, device=device)
    trunk.to(device)
    check_trunk(trunk, path)
    return trunk


def quantize_linears(trunk: Trunk, format: str, *, device: torch.device | None = None) -> None:
    """Pack the decoder's linears in place, one after the other, each on `device` (None = where it is).

    Embeddings, norms and heads stay what and where they are; at most one matrix exists twice.
    """
    for path in list(find_linears(trunk.decoder, ("all-linear",))):  # a list of names keeps no linear alive
        linear = trunk.decoder.get_submodule(path)
        if not can_pack(linear):
            continue
        if device is not None:
            linear.to(device)
        trunk.decoder.set_submodule(path, QuantizedLinear.from_linear(linear, format))


def refuse_missing(trunk: Trunk, missing: set[str], path: str) -> None:
    """Raise `ModelError` where weights are not in the files: transformers would make them up, differently each time.

    Only an LM head may be missing (of a reward model, say); it is dropped, and no role can then read it.
    """
    head = trunk.model.get_output_embeddings()
    of_head = {name for name, module in trunk.model.named_modules() if module is head}
    rest = {name for name in missing if name.rpartition(".")[0] not in of_head}
    if rest:
        raise ModelError(
            f"{path} lacks {len(rest)} weights of {type(trunk.model).__name__}, e.g. {min(rest)}; is it whole?"
        )
    if missing:
        trunk.drop_lm_head()


def scratch_trunk(shape: str, tokenizer: PreTrainedTokenizerBase, config: ModelConfig, *, seed: int) -> Trunk:
    """A Llama with random weights seeded by `seed`, for the tokenizer's vocabulary; tied embeddings."""
    if shape not in SCRATCH_SHAPES:
        raise ModelError(f"model.path='scratch:{shape}' is unknown; there are {', '.join(SCRATCH_SHAPES)}")
    special_tokens: dict[str, Any] = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        **special_tokens,
        # Half the usual 1 / sqrt(h); the library's 0.02 suits wide models and makes narrow ones learn to copy late.
        initializer_range=0.5 * SCRATCH_SHAPES[shape]["hidden_size"] ** -0.5,
        **SCRATCH_SHAPES[shape],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(llama)
    model.set_attn_implementation(attention.NAME)
    model = to_dtype(model, dtype_of(config))
    return Trunk(model.to(pick_device(config.device)))  # pyright: ignore[reportArgumentType]


def load_tokenizer(path: str, config: ModelConfig, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name or a local folder. Raises `ModelError`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            path,
            revision=pinned_revision(path, config),
            local_files_only=config.offline,
            trust_remote_code=trust_remote_code,
        )
    except UNREADABLE as error:
        raise ModelError(f"model.path={path!r} has no tokenizer that can be loaded: {first_line(error)}") from error


def pinned_revision(path: str, config: ModelConfig) -> str | None:
    """`model.revision` pins `model.path`, not the other models of a run."""
    return config.revision if path == config.path else None


def without_dropout(config: PretrainedConfig) -> None:
    """Set every dropout rate of the config to zero: sampled and trained log-probs must come from one function."""
    for part in {id(c): c for c in (config, text_config(config))}.values():
        for name, value in list(vars(part).items()):
            if isinstance(value, float) and ("drop" in name or "pdrop" in name):
                setattr(part, name, 0.0)


def attention_implementation(config: PretrainedConfig) -> str | None:
    """Our fused attention where the family takes one from outside, eager where it caps attention logits (fused kernels
    ignore that), else transformers' choice."""
    if getattr(text_config(config), "attn_logit_softcapping", None):
        return "eager"
    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    takes_ours = getattr(family, "_supports_sdpa", False) and getattr(family, "_supports_attention_backend", False)
    return attention.NAME if takes_ours else None


def first_line(error: Exception) -> str:
    """The first line of a library's message, which says what is wrong; of the advice after it only what holds here."""
    lines = str(error).strip().splitlines()
    advice = "; if you trust it, give --trust-remote-code" if "trust_remote_code" in str(error) else ""
    text = " ".join(line.strip() for line in lines[: 1 + bool(lines and lines[0].endswith(":"))])
    return (text.rstrip(" .") or type(error).__name__) + advice
