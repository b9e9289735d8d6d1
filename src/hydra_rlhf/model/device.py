"""Where a model's weights are, and in which dtype: what the settings leave to the machine is settled here.

Why bfloat16 wherever there are units for it: docs/decisions/0019-bfloat16-where-the-hardware-has-units.md.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from hydra_rlhf.config import ModelConfig
from hydra_rlhf.errors import ModelError

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SCRATCH = "scratch:"
"""What the path of a model begins with whose weights begin as random numbers."""

CALL_TOKENS = 256
"""A forward and backward costs as much time as if it had this many tokens more (kernel launches, weights read)."""
CPU_CALL_TOKENS = 48
"""The same where no kernel has to be launched (measured: docs/decisions/0025)."""


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"model.device={name!r} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"model.device={name!r}, but torch sees no CUDA device; use model.device=cpu or auto")
    return device


def call_tokens(device: torch.device) -> int:
    """Tokens that a forward and backward could have more in the time that starting it takes."""
    return CPU_CALL_TOKENS if device.type == "cpu" else CALL_TOKENS


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether products of bfloat16 matrices run on units made for them, and not by way of float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # AMX units come with bfloat16 products; torch has no public name for either question in all its versions.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_dtype(config: ModelConfig) -> tuple[str, str]:
    """(name of the dtype of the base's weights, why it is that one). Raises `ModelError` for a device not there."""
    if config.dtype != "auto":
        return config.dtype, "as set"
    if config.path.startswith(SCRATCH):
        return "float32", "auto: a small model that begins with random weights"
    device = pick_device(config.device)
    if has_bfloat16_units(device):
        return "bfloat16", f"auto: this {device.type.upper()} has units for it"
    return "float32", f"auto: this {device.type.upper()} has no units for bfloat16"


def with_dtype(config: ModelConfig) -> ModelConfig:
    """The settings with a dtype that is settled."""
    return replace(config, dtype=choose_dtype(config)[0])


def dtype_of(config: ModelConfig) -> torch.dtype:
    """The dtype of the base's weights."""
    return DTYPES[choose_dtype(config)[0]]
