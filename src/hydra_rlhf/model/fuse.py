"""Let a decoder's gated MLPs and RMS norms keep less for backward; what they compute stays the same, bit for bit."""

from functools import partial
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hydra_rlhf.model.fused import GatedDown, Recomputed
from hydra_rlhf.model.lora import LoraLinear

MLP_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


def fuse_layers(decoder: nn.Module) -> None:
    """Replace the forwards of gated MLPs and RMS norms in place; modules of other forms stay as they are."""
    known: dict[type[nn.Module], bool] = {}
    for module in decoder.modules():
        kind = type(module)
        if "RMSNorm" in kind.__name__:
            module.forward = MethodType(recomputed_norm, module)
        elif all(hasattr(module, part) for part in MLP_PARTS):
            if kind not in known:
                known[kind] = is_plain_gated_mlp(module)
            if known[kind]:
                module.forward = MethodType(fused_mlp, module)


def recomputed_norm(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A norm's own forward, keeping x and not what it computes on the way; a method, so that a copy runs the copy."""
    forward = partial(type(self).forward, self)
    if args or kwargs or not torch.is_grad_enabled():
        return forward(x, *args, **kwargs)
    return Recomputed.apply(forward, 1, x, *self.parameters(recurse=False))


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
