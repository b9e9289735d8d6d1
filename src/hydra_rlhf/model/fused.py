"""Layers that keep what backward needs and nothing twice: LoRA linears, gated MLPs and norms (performance, not maths).

Every function computes what the plain modules compute, bit for bit; backward recomputes elementwise intermediates. The
plain forms stay in the tests as the reference.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def weight_of(linear: nn.Module) -> Float[Tensor, "o i"]:
    """The weight of any of the three kinds, laid out as [out, in]; a quantised one is unpacked anew."""
    if hasattr(linear, "dequantize"):
        return linear.dequantize()  # pyright: ignore[reportCallIssue]
    weight: Tensor = linear.weight  # pyright: ignore[reportAssignmentType]
    return weight if isinstance(linear, nn.Linear) else weight.T


FEW_ROWS = 128
"""Up to here products of a few rows with a large matrix are turned round."""


def frozen_output(linear: nn.Module, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
    """W x + b. Without a graph a plain linear is not called as a module, which a decode step would do 200 times."""
    if type(linear) is not nn.Linear or torch.is_grad_enabled():
        return linear(x)
    if x.dim() == 3 and x.shape[1] == 1:  # a decode step
        return frozen_product(x.squeeze(1), linear.weight, linear.bias).unsqueeze(1)
    return torch.nn.functional.linear(x, linear.weight, linear.bias)


def frozen_product(
    x: Float[Tensor, "n i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None
) -> Float[Tensor, "n o"]:
    """x W^T + b of a decode step: a few rows in float32 on the CPU are computed as (W x^T)^T, without gradients.

    Reading W once is all that such a product costs, and the usual order reads it slowly. Decoding with a 135M model and
    two cores took 0.79, 0.93 and 0.93 x the time for it at 4, 16 and 64 rows; in bfloat16 1.09, 1.00 and 0.99 x, so
    there it stays as it is.
    """
    few = 1 < len(x) <= FEW_ROWS and x.dtype == torch.float32 and x.device.type == "cpu"
    if not few or torch.is_grad_enabled():
        return torch.nn.functional.linear(x, weight, bias)
    output = torch.mm(weight, x.T).T.contiguous()
    return output if bias is None else output.add_(bias)


def rows(x: Float[Tensor, "*n d"]) -> Float[Tensor, "m d"]:
    """All leading dimensions as one: 2-D products take the fast path everywhere."""
    return x.reshape(-1, x.shape[-1])


def stack_rows(As: Sequence[Tensor], dtype: torch.dtype) -> Float[Tensor, "r i"]:
    """Several A as one, in the dtype that computes; a single one that has it already as it is."""
    return (torch.cat(tuple(As)) if len(As) > 1 else As[0]).to(dtype)


class LoraProducts(torch.autograd.Function):
    """x -> W x + b + sum_i s_i B_i A_i x of several linears that read the same x, their W frozen.

    Keeps x once and the A_i x, neither an update nor an output. One function for all of them, so that what each says of
    x's gradient is added up in place, and so that Python is asked once.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, linears: Sequence[nn.Module], scales: Sequence[float], *As_and_Bs: Tensor
    ) -> tuple[Tensor, ...]:
        """[*n, i] -> [*n, o] per linear. Scales are those of one linear, the same for all; `As_and_Bs` are the A
        [r, i], those of one linear together, then the B [o, r] in the same order."""
        As, Bs = As_and_Bs[: len(As_and_Bs) // 2], As_and_Bs[len(As_and_Bs) // 2 :]
        u = torch.nn.functional.linear(x, stack_rows(As, x.dtype))
        ctx.linears, ctx.scales, ctx.ranks = linears, scales, [len(A) for A in As]
        ctx.save_for_backward(x, u, *As_and_Bs)
        return outputs_of(x, u, linears, scales, ctx.ranks, Bs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """du_i = s_i dy B_i, dB_i = s_i dy^T u_i, dx = sum dy W + sum_i du_i A_i, dA_i = du_i^T x."""
        x, u, *As_and_Bs = ctx.saved_tensors
        half, n = len(As_and_Bs) // 2, len(ctx.scales)
        As, Bs, us = As_and_Bs[:half], As_and_Bs[half:], rows(u).split(ctx.ranks, dim=-1)
        wants_x, _, _, *wanted = ctx.needs_input_grad
        dx: Tensor | None = None
        dus: list[Tensor] = []
        dBs: list[Tensor | None] = []
        for number, (linear, grad) in enumerate(zip(ctx.linears, grads, strict=True)):
            dy, own = rows(grad), slice(number * n, (number + 1) * n)
            du, dB = update_gradients(dy, ctx.scales, us[own], Bs[own], wanted[half:][own])
            dus += du
            dBs += dB
            if wants_x:
                dx = dy @ weight_of(linear) if dx is None else dx.addmm_(dy, weight_of(linear))
        du = torch.cat(dus, dim=1) if len(dus) > 1 else dus[0]
        if dx is not None:
            dx = dx.addmm_(du, stack_rows(As, x.dtype)).view(x.shape)
        return dx, None, None, *stacked_gradients(du, x, As, wanted[:half]), *dBs


def outputs_of(
    x: Float[Tensor, "*n i"],
    u: Float[Tensor, "*n r"],
    linears: Sequence[nn.Module],
    scales: Sequence[float],
    ranks: Sequence[int],
    Bs: Sequence[Tensor],
) -> tuple[Float[Tensor, "*n o"], ...]:
    """Each linear's output with its updates, from x and from what all A say of x."""
    n, us = len(scales), rows(u).split(ranks, dim=-1)
    return tuple(
        add_updates(frozen_output(linear, x), scales, us[i * n : (i + 1) * n], Bs[i * n : (i + 1) * n])
        for i, linear in enumerate(linears)
    )


def add_updates(
    y: Float[Tensor, "*n o"], scales: Sequence[float], us: Sequence[Float[Tensor, "m _"]], Bs: Sequence[Tensor]
) -> Float[Tensor, "*n o"]:
    """y + sum_i s_i B_i u_i, in place."""
    flat = y.view(-1, y.shape[-1])
    for scale, u, B in zip(scales, us, Bs, strict=True):
        flat.addmm_(u, B.to(y.dtype).T, alpha=scale)
    return y


def update_gradients(
    dy: Float[Tensor, "m o"],
    scales: Sequence[float],
    us: Sequence[Tensor],
    Bs: Sequence[Tensor],
    wanted: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Gradients of the u_i [m, r_i], and of the B_i where they are wanted."""
    dus = [(dy @ B.to(dy.dtype)).mul_(scale) for scale, B in zip(scales, Bs, strict=True)]
    dBs = [
        (dy.T @ u).mul_(scale).to(B.dtype) if want else None
        for scale, u, B, want in zip(scales, us, Bs, wanted, strict=True)
    ]
    return dus, dBs


def stacked_gradients(
    du: Float[Tensor, "m r"], x: Float[Tensor, "*n i"], As: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the A that are wanted: one product for all of them."""
    if not any(wanted):
        return [None] * len(As)
    parts = (du.T @ rows(x)).split([len(A) for A in As])
    return [part.to(A.dtype) if want else None for part, A, want in zip(parts, As, wanted, strict=True)]


class GatedDown(torch.autograd.Function):
    """act(gate) * up -> W h + b + sum_i s_i B_i A_i h with W frozen; keeps gate, up and the A_i h, not h."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        act: Callable[[Tensor], Tensor],
        linear: nn.Module,
        scales: Sequence[float],
        *As_and_Bs: Tensor,
    ) -> Tensor:
        """`As_and_Bs` are the A_i [r_i, f], then the B_i [o, r_i]."""
        ctx.act, ctx.linear, ctx.scales = act, linear, scales
        h = act(gate).mul_(up)
        As, Bs = As_and_Bs[: len(scales)], As_and_Bs[len(scales) :]
        u = torch.nn.functional.linear(h, stack_rows(As, h.dtype))
        ctx.ranks = [len(A) for A in As]
        ctx.save_for_backward(gate, up, u, *As_and_Bs)
        return outputs_of(h, u, [linear], scales, ctx.ranks, Bs)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As in `LoraProducts`, with h computed again."""
        gate, up, u, *As_and_Bs = ctx.saved_tensors
        n, dy = len(ctx.scales), rows(grad)
        As, Bs, us = As_and_Bs[:n], As_and_Bs[n:], rows(u).split(ctx.ranks, dim=-1)
        wanted = ctx.needs_input_grad[5:]
        dus, dBs = update_gradients(dy, ctx.scales, us, Bs, wanted[n:])
        du = torch.cat(dus, dim=1) if n > 1 else dus[0]
        dh = (dy @ weight_of(ctx.linear)).addmm_(du, stack_rows(As, dy.dtype))
        h, dgate, dup = gated_gradients(ctx.act, gate, up, dh.view(gate.shape))
        return dgate, dup, None, None, None, *stacked_gradients(du, h, As, wanted[:n]), *dBs


def gated_gradients(
    act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor, dh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """h = act(gate) * up, computed again, and the gradients of gate and up."""
    if isinstance(act, nn.SiLU):
        activated = act(gate)
        return activated * up, torch.ops.aten.silu_backward(dh * up, gate), dh * activated
    with torch.enable_grad():
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        h = act(gate) * up
    dgate, dup = torch.autograd.grad(h, (gate, up), dh)
    return h.detach(), dgate, dup


class RmsNorm(torch.autograd.Function):
    """A norm's own forward of x alone; keeps x, and backward is that of w * x / sqrt(mean(x^2) + eps), w frozen.

    The gradient by way of autograd, through the forward computed again, takes three times as long.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """function(x), where `weight` is w."""
        ctx.eps = eps
        ctx.save_for_backward(x, weight)
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """dx = r g - x r^3 mean(g x) with r = 1 / sqrt(mean(x^2) + eps) and g = w dy, in at least float32."""
        x, weight = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        size, wide_x = x.shape[-1], x.to(wide)
        r = torch.linalg.vector_norm(wide_x, dim=-1, keepdim=True).square_().div_(size).add_(ctx.eps).rsqrt_()
        g = grad * weight.to(wide)
        along = torch.linalg.vecdot(g, wide_x)[..., None].mul_(r).div_(size).mul_(r)
        return None, g.addcmul_(wide_x, along, value=-1.0).mul_(r).to(x.dtype), None, None


class Recomputed(torch.autograd.Function):
    """An elementwise or row-wise function; keeps its inputs alone and is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], num_inputs: int, *tensors: Tensor) -> Tensor:
        """function(*inputs), where `tensors` are the inputs and then the parameters that the function reads."""
        ctx.function, ctx.num_inputs = function, num_inputs
        ctx.save_for_backward(*tensors)
        return function(*tensors[:num_inputs])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The function's own gradients."""
        n, needed = ctx.num_inputs, ctx.needs_input_grad[2:]
        tensors = list(ctx.saved_tensors)
        inputs = [x.detach().requires_grad_(need) for x, need in zip(tensors[:n], needed, strict=False)]
        with torch.enable_grad():
            output = ctx.function(*inputs)
        wanted = [x for x, need in zip(inputs + tensors[n:], needed, strict=True) if need]
        found = iter(torch.autograd.grad(output, wanted, grad))
        return None, None, *(next(found) if need else None for need in needed)
