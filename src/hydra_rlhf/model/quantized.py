"""Frozen linears held in 4 or 8 bits and unpacked for each product; only the gradient of their input passes through.

`nf4`: blocks of 64 numbers as 4-bit codes, the blocks' scales as 8-bit codes in their turn (double quantisation,
Dettmers et al. 2023), in the layout of bitsandbytes. `int8`: one scale per output row, plain torch.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hydra_rlhf.errors import ModelError
from hydra_rlhf.model.fused import weight_of
from hydra_rlhf.runtime.extras import load_bitsandbytes

NF4_BLOCK = 64
"""Numbers that share a scale in `nf4`."""
SCALE_BLOCK = 256
"""Scales of `nf4` that share a scale of theirs."""
INT8_MAX = 127
BASE_FILE = "quantized_base.json"
"""In a stage-1 folder that holds an adapter instead of weights: which base it belongs on."""


class QuantizedLinear(nn.Module):
    """y = W x + b with W packed. Everything it holds is a buffer (the bias a frozen parameter), so that copies, moves
    and byte counts are those of any module."""

    packed: Tensor
    scale: Tensor
    scale_of_scale: Tensor
    scale_mean: Tensor
    scale_code: Tensor

    def __init__(self, packed: dict[str, Tensor], linear: nn.Module, format: str) -> None:
        """`packed` as `pack` makes it from the weight of `linear`."""
        super().__init__()
        weight = weight_of(linear)
        self.out_features, self.in_features = weight.shape
        self.compute_dtype = weight.dtype
        self.format = format
        self.kind = type(linear)
        """What it was: `nn.Linear`, or transformers' `Conv1D`, whose weight is stored transposed."""
        for name, tensor in packed.items():
            self.register_buffer(name, tensor)
        bias: Tensor | None = linear.bias  # pyright: ignore[reportAssignmentType]
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Module, format: str) -> "QuantizedLinear":
        """Pack an `nn.Linear` or a `Conv1D`, on the device it is on; on the meta device shapes and dtypes only.

        Raises `ConfigError` for `nf4` without bitsandbytes, except on the meta device.
        """
        return cls(pack(weight_of(linear).detach(), format), linear, format)

    @property
    def device(self) -> torch.device:
        """Where the packed weight is."""
        return self.packed.device

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """The weight, unpacked anew: for model code that looks at a linear's weight instead of calling it."""
        return self.dequantize()

    @torch.no_grad()
    def dequantize(self) -> Float[Tensor, "o i"]:
        """The weight as [out, in] in `compute_dtype`, in storage of its own."""
        shape = torch.Size((self.out_features, self.in_features))
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.compute_dtype, device="meta")
        if self.format == "int8":
            return self.packed.to(self.compute_dtype).mul_(self.scale[:, None])
        functional = load_bitsandbytes("model.quantization=nf4").functional
        # A block to a row: with rows of other lengths the library's AVX-512 code takes scales of the wrong blocks.
        length = NF4_BLOCK if shape.numel() % NF4_BLOCK == 0 else shape.numel()
        scales = functional.QuantState(
            absmax=self.scale_of_scale, code=self.scale_code, blocksize=SCALE_BLOCK, dtype=torch.float32
        )
        state = functional.QuantState(
            absmax=self.scale,
            offset=self.scale_mean,
            state2=scales,
            shape=torch.Size((shape.numel() // length, length)),
            dtype=self.compute_dtype,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
        )
        return functional.dequantize_4bit(self.packed, state).view(shape)

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """[*n, in_features] -> [*n, out_features]."""
        return UnpackedProduct.apply(x, self)

    def to_linear(self) -> nn.Module:
        """The plain linear it came from, with the weight as it is now, in storage of its own."""
        bias = None if self.bias is None else self.bias.detach().clone()
        with torch.device("meta"):  # its own weight would only be thrown away
            if self.kind is nn.Linear:
                linear = nn.Linear(self.in_features, self.out_features, bias=bias is not None)
            else:
                linear = self.kind(self.out_features, self.in_features)
        weight = self.dequantize()
        stored = weight if self.kind is nn.Linear else weight.T.contiguous()
        linear.register_parameter("weight", nn.Parameter(stored, requires_grad=False))
        linear.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        return linear

    def extra_repr(self) -> str:
        """Sizes and format, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, format={self.format}, bias={self.bias is not None}"


class UnpackedProduct(torch.autograd.Function):
    """x -> W x + b for a packed W; keeps neither x nor the unpacked W, which backward unpacks again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantizedLinear) -> Tensor:
        """[*n, i] -> [*n, o]."""
        ctx.linear = linear
        return F.linear(x, linear.dequantize(), linear.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """dx = dy W."""
        return grad @ ctx.linear.dequantize(), None


def can_pack(linear: nn.Module) -> bool:
    """True for the kinds whose product is known: a class derived from `nn.Linear` may do something else with it."""
    return type(linear) is nn.Linear or type(linear).__name__ == "Conv1D"


def pack(weight: Float[Tensor, "o i"], format: str) -> dict[str, Tensor]:
    """The buffers that hold a weight: `packed` and its scales. On the meta device of the same shapes and dtypes."""
    if format == "int8":
        return pack_int8(weight)
    assert format == "nf4", format
    return empty_nf4(weight.numel()) if weight.is_meta else pack_nf4(weight)


def pack_int8(weight: Float[Tensor, "o i"]) -> dict[str, Tensor]:
    """Codes in [-127, 127] and one scale per row, in the weight's dtype.

    A bf16 scale times a code is exact in float32, so unpacking in bf16 rounds once and needs no float32 copy.
    """
    scale = (weight.abs().amax(dim=1) / INT8_MAX).to(weight.dtype)
    divisor = torch.where(scale == 0, 1, scale)
    wide = torch.promote_types(weight.dtype, torch.float32)
    codes = (weight.to(wide) / divisor.to(wide)[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX)
    return {"packed": codes.to(torch.int8), "scale": scale}


def pack_nf4(weight: Float[Tensor, "o i"]) -> dict[str, Tensor]:
    """Two codes per byte; scales minus their mean as 8-bit codes, with a scale of their own per 256."""
    functional = load_bitsandbytes("model.quantization=nf4").functional
    packed, state = functional.quantize_4bit(weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
    # The library's own double quantisation takes this mean in float32, where it depends on the number of threads.
    mean = state.absmax.double().mean().float()
    scale, scales = functional.quantize_blockwise(state.absmax - mean, blocksize=SCALE_BLOCK)
    return {
        "packed": packed,
        "scale": scale,
        "scale_of_scale": scales.absmax,
        "scale_mean": mean,
        "scale_code": scales.code,
    }


def empty_nf4(num_weights: int) -> dict[str, Tensor]:
    """What `pack_nf4` makes of a weight of this many numbers, on the meta device."""
    num_blocks = -(-num_weights // NF4_BLOCK)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "packed": (((num_weights + 1) // 2, 1), torch.uint8),
        "scale": ((num_blocks,), torch.uint8),
        "scale_of_scale": ((-(-num_blocks // SCALE_BLOCK),), torch.float32),
        "scale_mean": ((), torch.float32),
        "scale_code": ((256,), torch.float32),
    }
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}


def unpack_linears(model: nn.Module) -> None:
    """Replace every packed linear of a model in place by the plain linear it stands for."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantizedLinear):
                setattr(parent, name, child.to_linear())


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedBase:
    """What a trunk's packed linears were made from: all it takes to make the same ones again."""

    path: str
    """Hub name, or whole path of a folder."""
    revision: str | None
    """What `model.revision` asked for."""
    commit: str | None
    """What the hub gave then; None for a folder."""
    quantization: str
    """`nf4` or `int8`."""
    dtype: str
    """Dtype of the weights that were packed, and of all that is computed."""

    def write(self, folder: Path, *, adapter: str | None) -> None:
        """Say in a stage-1 folder which base it belongs on; `adapter` names what stage 1 trained in that folder."""
        (folder / BASE_FILE).write_text(json.dumps(asdict(self) | {"adapter": adapter}, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "tuple[QuantizedBase, Path | None] | None":
        """(base, folder of the adapter on it) as `write` left them; None where there is nothing of the kind.

        Raises `ModelError` for a damaged file.
        """
        file = folder / BASE_FILE
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} cannot be read: {error}") from error
        names = {"adapter", *(field.name for field in fields(cls))}
        if not isinstance(content, dict) or set(content) != names:
            raise ModelError(f"{file} does not describe a quantised base: it needs exactly {', '.join(sorted(names))}")
        adapter = content.pop("adapter")
        return cls(**content), None if adapter is None else folder / adapter
