"""Let a decoder's gated MLPs and RMS norms keep less for backward; what they compute stays the same, bit for bit."""

import copy
import inspect
from functools import partial
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hydra_rlhf.model.fused import GatedDown, Recomputed, RmsNorm
from hydra_rlhf.model.lora import LoraLinear

MLP_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


def fuse_layers(decoder: nn.Module) -> None:
    """Replace the forwards of gated MLPs and RMS norms in place; modules of other forms stay as they are."""
    known: dict[type[nn.Module], bool] = {}
    norms: dict[tuple[object, ...], float | None] = {}
    for module in decoder.modules():
        kind = type(module)
        if "RMSNorm" in kind.__name__:
            key = (
                kind,
                eps_of(module),
                getattr(module, "weight", None) is None,
            )  # one class has some with, some without
            if key not in norms:
                norms[key] = norm_offset(module)
            module.norm_offset = norms[key]  # pyright: ignore[reportArgumentType]
            module.forward = MethodType(recomputed_norm, module)
        elif all(hasattr(module, part) for part in MLP_PARTS):
            if kind not in known:
                known[kind] = is_plain_gated_mlp(module)
            if known[kind]:
                module.forward = MethodType(fused_mlp, module)


def recomputed_norm(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A norm's own forward, keeping x and not what it computes on the way; a method, so that a copy runs the copy."""
    forward = partial(type(self).forward, self)
    if args or kwargs or not torch.is_grad_enabled():
        return forward(x, *args, **kwargs)
    offset = self.norm_offset
    if offset is not None and not self.weight.requires_grad:
        weight = offset + self.weight.float() if offset else self.weight  # families add in float32
        return RmsNorm.apply(forward, x, weight, eps_of(self))
    return Recomputed.apply(forward, 1, x, *self.parameters(recurse=False))


def eps_of(norm: Any) -> float | None:
    """What a norm adds to the mean of squares, by the two names that families have for it."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def needs_more(norm: nn.Module) -> bool:
    """Whether a norm cannot run on its input alone, as one that is gated."""
    _, _, *others = inspect.signature(type(norm).forward).parameters.values()
    return any(other.default is other.empty and other.kind != other.VAR_KEYWORD for other in others)


@torch.no_grad()
def norm_offset(norm: Any) -> float | None:
    """c of a norm that is (c + weight) * x / sqrt(mean(x^2) + eps), None for any other: asked with numbers."""
    weight, eps = getattr(norm, "weight", None), eps_of(norm)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float) or needs_more(norm):
        return None
    if weight.is_meta:
        return 0.0  # memory is planned on shapes; the model that trains is asked
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, len(weight), generator=generator).to(weight.device, torch.float64) for n in (3, 1))
    x *= eps**0.5  # so that eps counts
    twin = copy.deepcopy(norm).double()
    twin.weight.copy_(w[0])
    found = type(norm).forward(twin, x).double()
    normed = x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return next((c for c in (0.0, 1.0) if torch.allclose(found, (c + w) * normed, rtol=1e-4, atol=1e-6)), None)


def fused_mlp(self: Any, x: Float[Tensor, "*n h"]) -> Float[Tensor, "*n h"]:
    """down(act(gate(x)) * up(x)), keeping gate(x) and up(x) and neither the activation nor the product."""
    gate, up = self.gate_proj(x), self.up_proj(x)
    down = self.down_proj
    if isinstance(down, LoraLinear):
        if not torch.is_grad_enabled():
            return down(self.act_fn(gate).mul_(up))
        if down.switch.stack:
            As, Bs, scales = down.updates()
            return GatedDown.apply(gate, up, self.act_fn, down.linear, scales, *As, *Bs)
    return down(Recomputed.apply(partial(gated, self.act_fn), 2, gate, up))


def gated(act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up."""
    return act(gate) * up


@torch.no_grad()
def is_plain_gated_mlp(mlp: nn.Module) -> bool:
    """Whether this family's MLP is what `fused_mlp` computes: asked with numbers, since families only share names."""
    weight: Tensor = mlp.gate_proj.weight  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
    if weight.is_meta:
        return True  # memory is planned on shapes; the model that trains is asked
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.shape[1], generator=generator).to(weight)
    return torch.equal(type(mlp).forward(mlp, x), fused_mlp(mlp, x))
