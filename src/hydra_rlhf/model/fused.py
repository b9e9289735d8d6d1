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
    """W x + b."""
    if x.dim() != 3 or x.shape[1] != 1 or type(linear) is not nn.Linear or torch.is_grad_enabled():
        return linear(x)
    return frozen_product(x[:, 0], linear.weight, linear.bias)[:, None]  # a decode step


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


def products(x: Float[Tensor, "*n i"], As: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """x A_i^T of each A, in one product; everywhere the same one, so that rounding does not depend on the path."""
    return torch.nn.functional.linear(x, stack_rows(As, x.dtype)).split([len(A) for A in As], dim=-1)


def stack_rows(As: Sequence[Tensor], dtype: torch.dtype) -> Float[Tensor, "r i"]:
    """Several A as one, in the dtype that computes; a single one that has it already as it is."""
    return torch.cat([A.to(dtype) for A in As]) if len(As) > 1 else As[0].to(dtype)


class LoraDown(torch.autograd.Function):
    """x -> x A_i^T for the A of several linears that read the same x, in one product; keeps x once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *As: Tensor) -> tuple[Tensor, ...]:
        """[*n, i] -> one [*n, r_i] per A."""
        ctx.save_for_backward(x, *As)
        return products(x, As)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """dx = sum_i du_i A_i, dA_i = du_i^T x."""
        x, *As = ctx.saved_tensors
        du = torch.cat([rows(grad) for grad in grads], dim=1)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (du @ torch.cat([A.to(x.dtype) for A in As])).view(x.shape)
        dAs = du.T @ rows(x)
        return dx, *(
            part.to(A.dtype) if needed else None
            for part, A, needed in zip(dAs.split([len(A) for A in As]), As, ctx.needs_input_grad[1:], strict=True)
        )


class LoraUp(torch.autograd.Function):
    """x, u_i -> W x + b + sum_i s_i B_i u_i with W frozen; keeps the u_i and neither x nor an update."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: nn.Module, scales: Sequence[float], *us_and_Bs: Tensor) -> Tensor:
        """`us_and_Bs` are the u_i [*n, r_i], then the B_i [o, r_i]."""
        ctx.linear, ctx.scales = linear, scales
        ctx.save_for_backward(*us_and_Bs)
        ctx.x_shape = x.shape
        return add_updates(frozen_output(linear, x), scales, us_and_Bs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """dx = dy W, du_i = s_i dy B_i, dB_i = s_i dy^T u_i."""
        dy = rows(grad)
        dx = (dy @ weight_of(ctx.linear)).view(ctx.x_shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, *update_gradients(dy, ctx.scales, ctx.saved_tensors, ctx.needs_input_grad[3:])


def add_updates(y: Tensor, scales: Sequence[float], us_and_Bs: Sequence[Tensor]) -> Tensor:
    """y + sum_i s_i B_i u_i, in place."""
    flat = y.view(-1, y.shape[-1])
    for scale, u, B in zip(scales, us_and_Bs[: len(scales)], us_and_Bs[len(scales) :], strict=True):
        flat.addmm_(rows(u), B.to(y.dtype).T, alpha=scale)
    return y


def update_gradients(
    dy: Float[Tensor, "m o"], scales: Sequence[float], us_and_Bs: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the u_i, then of the B_i; None where not needed."""
    us, Bs = us_and_Bs[: len(scales)], us_and_Bs[len(scales) :]
    dus = [
        (dy @ B.to(dy.dtype)).mul_(scale).view(u.shape) if want else None
        for scale, u, B, want in zip(scales, us, Bs, needed, strict=False)
    ]
    dBs = [
        (dy.T @ rows(u)).mul_(scale).to(B.dtype) if want else None
        for scale, u, B, want in zip(scales, us, Bs, needed[len(scales) :], strict=True)
    ]
    return [*dus, *dBs]


class GatedDown(torch.autograd.Function):
    """act(gate) * up -> W h + b + sum_i s_i B_i A_i h with W frozen; keeps gate, up and the u_i = A_i h, not h."""

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
        us = products(h, As)
        ctx.save_for_backward(gate, up, *us, *As_and_Bs)
        return add_updates(frozen_output(linear, h), scales, [*us, *Bs])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As in `LoraDown` and `LoraUp`, with h computed again."""
        n = len(ctx.scales)
        gate, up, *rest = ctx.saved_tensors
        us, As, Bs = rest[:n], rest[n : 2 * n], rest[2 * n :]
        dy, needed = rows(grad), ctx.needs_input_grad
        gradients = update_gradients(dy, ctx.scales, [*us, *Bs], [True] * n + list(needed[5 + n :]))
        dus = [du for du in gradients[:n] if du is not None]
        dh = dy @ weight_of(ctx.linear)
        for du, A in zip(dus, As, strict=True):
            dh.addmm_(rows(du), A.to(dh.dtype))
        h, dgate, dup = gated_gradients(ctx.act, gate, up, dh.view(gate.shape))
        dAs = [
            (rows(du).T @ rows(h)).to(A.dtype) if want else None
            for du, A, want in zip(dus, As, needed[5 : 5 + n], strict=True)
        ]
        return dgate, dup, None, None, None, *dAs, *gradients[n:]


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
        """dx = r (g - n mean(g n)) with r = 1 / sqrt(mean(x^2) + eps), n = r x and g = w dy; at least float32."""
        x, weight = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        n = x.to(wide)
        r = n.square().mean(dim=-1, keepdim=True).add_(ctx.eps).rsqrt_()
        n = n * r
        g = grad.to(wide) * weight.to(wide)
        shared = torch.linalg.vecdot(g, n).div_(x.shape[-1])[..., None]
        return None, g.sub_(n.mul_(shared)).mul_(r).to(x.dtype), None, None


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
