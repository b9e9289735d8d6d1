"""LoRA linears with several named adapters (Hu et al. 2021), chosen by an explicit value that forward captures.

The adapters in use are read once, when a linear runs forward; autograd then holds their tensors, so a backward pass
gives the right gradients whatever is in use by then. Recomputation under activation checkpointing re-enters the
captured stack through `recompute_contexts`. There is no way to switch an adapter on and leave it on.
"""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hydra_rlhf.errors import ConfigError
from hydra_rlhf.model.adapters import AdapterSwitch, SharedInput
from hydra_rlhf.model.fused import frozen_output
from hydra_rlhf.model.quantized import QuantizedLinear

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Sibling linears that decoders call on one tensor; a pair of names that is called on two costs a product, no more."""


class LoraLinear(nn.Module):
    """A frozen linear y = W x + b with named low-rank updates: y + (alpha / rank) B A x of each adapter in use.

    With none in use the frozen linear's output is returned untouched, bit for bit. The adapters are kept in their own
    dtype and compute in that of x.
    """

    def __init__(self, linear: nn.Module, switch: AdapterSwitch, shared: SharedInput | None = None) -> None:
        super().__init__()
        self.linear = linear
        self.switch = switch
        self.lora_A = nn.ParameterDict()
        """Per adapter: A of shape [rank, in_features]."""
        self.lora_B = nn.ParameterDict()
        """Per adapter: B of shape [out_features, rank]."""
        self.scale: dict[str, float] = {}
        self.rank: dict[str, int] = {}
        self.shared = shared or SharedInput()
        self.shared.members.append(self)

    @property
    def weight(self) -> Tensor:
        """The frozen weight; some model code reads its dtype or device."""
        return self.linear.weight  # pyright: ignore[reportReturnType]

    def add_adapter(
        self, name: str, *, rank: int, alpha: float, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        """Add a zero update: A uniform as Kaiming et al. (a = sqrt 5) from `generator`, B zero."""
        in_features, out_features = linear_features(self.linear)
        bound = in_features**-0.5
        device = next(iter(self.linear.state_dict().values())).device
        if device.type == "meta":
            A = torch.empty(rank, in_features, device=device)
        else:
            A = torch.empty(rank, in_features, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        self.lora_A[name] = nn.Parameter(A.to(device=device, dtype=dtype))
        self.lora_B[name] = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        self.scale[name], self.rank[name] = alpha / rank, rank

    def drop_adapter(self, name: str) -> None:
        """Forget one adapter."""
        del self.lora_A[name], self.lora_B[name], self.scale[name], self.rank[name]

    def updates(self) -> tuple[list[nn.Parameter], list[nn.Parameter], tuple[float, ...]]:
        """A, B and scale of each adapter in use, from the bottom of the stack up."""
        stack = self.switch.stack
        return [self.lora_A[n] for n in stack], [self.lora_B[n] for n in stack], tuple(self.scale[n] for n in stack)

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """[*n, in_features] -> [*n, out_features] with the adapters in use now."""
        together = self.switch.stack or self.shared.tiles is not None
        return self.shared.output(self, x) if together else frozen_output(self.linear, x)

    def extra_repr(self) -> str:
        """The adapters' names, for `print(model)`."""
        return f"adapters={list(self.scale)}"


def linear_features(linear: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of any of the three kinds; a transformers `Conv1D` stores its weight transposed."""
    if isinstance(linear, nn.Linear | QuantizedLinear):
        return linear.in_features, linear.out_features
    weight: Tensor = linear.weight  # pyright: ignore[reportAssignmentType]
    in_features, out_features = weight.shape
    return in_features, out_features


def is_linear(module: nn.Module) -> bool:
    """True for the two kinds of linear that decoders of transformers are made of, and for the packed form of both."""
    return isinstance(module, nn.Linear | QuantizedLinear) or type(module).__name__ == "Conv1D"


def find_linears(decoder: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Module]:
    """The targeted linears of a decoder as {path: linear}, those inside LoRA linears under the LoRA linears' paths.

    `targets` is `("all-linear",)` or the last name(s) of the modules to adapt. Raises `ConfigError` for a target that
    matches nothing.
    """
    outer = {id(module.linear): path for path, module in decoder.named_modules() if isinstance(module, LoraLinear)}
    found = {outer.get(id(module), path): module for path, module in decoder.named_modules() if is_linear(module)}
    if not found:
        raise ConfigError(f"lora.targets={list(targets)}: this model has no linear layers that can be found")
    if targets == ("all-linear",):
        return found
    for target in targets:
        if not any(f".{path}".endswith(f".{target}") for path in found):
            names = sorted({path.rsplit(".", 1)[-1] for path in found})
            raise ConfigError(f"lora.targets: no linear is called {target!r}; this model has {', '.join(names)}")
    return {path: m for path, m in found.items() if any(f".{path}".endswith(f".{target}") for target in targets)}


def check_rank(linears: Iterable[nn.Module], rank: int) -> None:
    """Raise `ConfigError` for a rank that no matrix has: the update would be larger than what it updates."""
    full = max(min(linear_features(linear)) for linear in linears)
    if rank > full:
        raise ConfigError(f"lora.rank={rank} is above the full rank of the largest adapted matrix; use at most {full}")


def wrap_linears(decoder: nn.Module, switch: AdapterSwitch, targets: tuple[str, ...]) -> dict[str, LoraLinear]:
    """Replace the targeted linears of `decoder` in place by LoRA linears, as {path: linear}. Weights are untouched."""
    wrapped: dict[str, LoraLinear] = {}
    shared: dict[tuple[str, tuple[str, ...]], SharedInput] = {}
    for path, module in find_linears(decoder, targets).items():
        parent, _, name = path.rpartition(".")
        siblings = next((names for names in SHARED_INPUTS if name in names), (name,))
        wrapped[path] = LoraLinear(module, switch, shared.setdefault((parent, siblings), SharedInput()))
        setattr(decoder.get_submodule(parent), name, wrapped[path])
    return wrapped


def unwrap_linears(decoder: nn.Module, wrapped: Mapping[str, LoraLinear]) -> None:
    """Undo `wrap_linears`: put the plain linears back and drop the adapters."""
    for path, lora_linear in wrapped.items():
        parent, _, name = path.rpartition(".")
        setattr(decoder.get_submodule(parent), name, lora_linear.linear)


@torch.no_grad()
def merge_into_linears(wrapped: Mapping[str, LoraLinear], *adapters: str) -> None:
    """Add the adapters' updates to the weights, once, computed in float32 and rounded to the weight's dtype.

    Only for a base that becomes a new base (stage 1) or for a copy that is exported, never for the shared base of
    stage 2: in bf16 the rounding cannot be undone.
    """
    for lora_linear in wrapped.values():
        assert not isinstance(lora_linear.linear, QuantizedLinear), "packed weights are never written"
        weight = lora_linear.weight
        merged = weight.float()
        for adapter in adapters:
            A, B = lora_linear.lora_A[adapter].float(), lora_linear.lora_B[adapter].float()
            update = lora_linear.scale[adapter] * (B @ A)
            merged = merged + (update if isinstance(lora_linear.linear, nn.Linear) else update.T)
        weight.copy_(merged)
