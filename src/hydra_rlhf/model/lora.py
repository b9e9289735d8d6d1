"""LoRA linears with several named adapters (Hu et al. 2021), chosen by an explicit value that forward captures.

The adapter in use is read once, when a linear runs forward; autograd then holds that adapter's tensors, so a backward
pass gives the right gradients whatever is active by then. Recomputation under activation checkpointing re-enters the
captured adapter through `recompute_contexts`. There is no way to switch an adapter on and leave it on.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hydra_rlhf.errors import ConfigError


class AdapterSwitch:
    """Which adapter the LoRA linears of one trunk use when they run forward; shared by all of them."""

    def __init__(self) -> None:
        self.active: str | None = None

    @contextmanager
    def use(self, adapter: str | None) -> Iterator[None]:
        """Make `adapter` (None = LoRA off) the active one inside the block; restored on exit, error or not."""
        before, self.active = self.active, adapter
        try:
            yield
        finally:
            self.active = before

    def recompute_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """`context_fn` of `torch.utils.checkpoint`: recompute with the adapter that is active now, in forward."""
        return nullcontext(), self.use(self.active)


class LoraLinear(nn.Module):
    """A frozen linear y = W x + b with named low-rank updates: y + (alpha / rank) * B A x for the active adapter.

    With no adapter active the frozen linear's output is returned untouched, bit for bit.
    """

    def __init__(self, linear: nn.Module, switch: AdapterSwitch) -> None:
        super().__init__()
        self.linear = linear
        self.switch = switch
        self.lora_A = nn.ParameterDict()
        """Per adapter: A of shape [rank, in_features]."""
        self.lora_B = nn.ParameterDict()
        """Per adapter: B of shape [out_features, rank]."""
        self.scale: dict[str, float] = {}

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
        A = torch.empty(rank, in_features, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        device = self.weight.device
        self.lora_A[name] = nn.Parameter(A.to(device=device, dtype=dtype))
        self.lora_B[name] = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        self.scale[name] = alpha / rank

    def drop_adapter(self, name: str) -> None:
        """Forget one adapter."""
        del self.lora_A[name], self.lora_B[name], self.scale[name]

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """[*n, in_features] -> [*n, out_features] with the adapter that is active now."""
        y = self.linear(x)
        adapter = self.switch.active
        if adapter is None:
            return y
        A, B = self.lora_A[adapter], self.lora_B[adapter]
        update = F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))
        return y + self.scale[adapter] * update

    def extra_repr(self) -> str:
        """The adapters' names, for `print(model)`."""
        return f"adapters={list(self.scale)}"


def linear_features(linear: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of an `nn.Linear` or a transformers `Conv1D`, whose weight is stored transposed."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    weight: Tensor = linear.weight  # pyright: ignore[reportAssignmentType]
    in_features, out_features = weight.shape
    return in_features, out_features


def is_linear(module: nn.Module) -> bool:
    """True for the two kinds of linear that decoders of transformers are made of."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def find_linears(decoder: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Module]:
    """The targeted linears of a decoder as {path: linear}.

    `targets` is `("all-linear",)` or the last name(s) of the modules to adapt. Raises `ConfigError` for a target that
    matches nothing.
    """
    found = {path: module for path, module in decoder.named_modules() if is_linear(module)}
    if not found:
        raise ConfigError(f"lora.targets={list(targets)}: this model has no linear layers that can be found")
    if targets == ("all-linear",):
        return found
    for target in targets:
        if not any(f".{path}".endswith(f".{target}") for path in found):
            names = sorted({path.rsplit(".", 1)[-1] for path in found})
            raise ConfigError(f"lora.targets: no linear is called {target!r}; this model has {', '.join(names)}")
    return {path: m for path, m in found.items() if any(f".{path}".endswith(f".{target}") for target in targets)}


def wrap_linears(decoder: nn.Module, switch: AdapterSwitch, targets: tuple[str, ...]) -> dict[str, LoraLinear]:
    """Replace the targeted linears of `decoder` in place by LoRA linears, as {path: linear}. Weights are untouched."""
    wrapped: dict[str, LoraLinear] = {}
    for path, module in find_linears(decoder, targets).items():
        parent, _, name = path.rpartition(".")
        wrapped[path] = LoraLinear(module, switch)
        setattr(decoder.get_submodule(parent), name, wrapped[path])
    return wrapped


def unwrap_linears(decoder: nn.Module, wrapped: Mapping[str, LoraLinear]) -> None:
    """Undo `wrap_linears`: put the plain linears back and drop the adapters."""
    for path, lora_linear in wrapped.items():
        parent, _, name = path.rpartition(".")
        setattr(decoder.get_submodule(parent), name, lora_linear.linear)


@torch.no_grad()
def merge_into_linears(wrapped: Mapping[str, LoraLinear], adapter: str) -> None:
    """Add one adapter's update to the weights, once, computed in float32 and rounded to the weight's dtype.

    Only for a base that becomes a new base (stage 1) or for a copy that is exported, never for the shared base of
    stage 2: in bf16 the rounding cannot be undone.
    """
    for lora_linear in wrapped.values():
        update = lora_linear.scale[adapter] * (
            lora_linear.lora_B[adapter].float() @ lora_linear.lora_A[adapter].float()
        )
        if not isinstance(lora_linear.linear, nn.Linear):
            update = update.T
        weight = lora_linear.weight
        weight.copy_(weight.float() + update)
