"""Log-probs of a frozen head whose gradient is ready when forward ends: one sweep over the tiles instead of two.

The gradient of a token's log-prob by its state is W[target] - sum_j p_j W_j, whatever the loss: a vector per token. Its
sum runs over the same tiles as the log-normaliser and is rescaled with it (as attention is made in tiles by Dao et al.
2022), so a second sweep that makes every tile again is not needed: two products with the head instead of three.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from hydra_rlhf.model.heads import LMHead
from hydra_rlhf.model.online_softmax import LogitShaping, RunningSoftmax
from hydra_rlhf.model.tiled_logprobs import add_product_, raw_tile, spans, tile_shape, widened


def one_sweep_will_do(head: LMHead, states: Float[Tensor, "n h"], *, entropy_gradient: bool) -> bool:
    """Whether nothing but the log-probs' gradient by the states is asked for, and logits are linear in them.

    On CUDA the kernel that folds a tile in one read is worth more. Tensors without numbers are treated as on the CPU.
    """
    trained = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    wanted = states.requires_grad and torch.is_grad_enabled() and not trained and not entropy_gradient
    return wanted and head.softcap is None and not states.is_cuda


def swept_logprobs(
    head: LMHead, states: Float[Tensor, "n h"], targets: Int[Tensor, " n"], *, temperature: float, tile_bytes: int
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """As `tiled_logprobs`, with the same numbers bit for bit, where `one_sweep_will_do`.

    At most two tiles live at once; for backward one vector in float32 is kept per token.
    """
    shaping = LogitShaping(scale=head.scale, softcap=None, temperature=temperature)
    shape = tile_shape(len(targets), len(head.weight), tile_bytes)
    return SweptLogprobs.apply(states, head.weight, head.bias, targets, shaping, shape)  # pyright: ignore[reportReturnType]


class SweptLogprobs(torch.autograd.Function):
    """(states, frozen weight and bias, targets) -> (logprobs, entropy); keeps one gradient vector per token."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Float[Tensor, "n h"],
        weight: Float[Tensor, "v h"],
        bias: Float[Tensor, " v"] | None,
        targets: Int[Tensor, " n"],
        shaping: LogitShaping,
        shape: tuple[int, int],
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Fold every tile into the statistics of its tokens and into sum_j exp(x_j - peak) W_j."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        softmax = RunningSoftmax.empty(len(targets), dtype=wide, device=states.device)
        pull = states.new_zeros(states.shape, dtype=wide)
        for vocabulary in spans(len(weight), shape[1]):
            columns = widened(weight[vocabulary])
            for tokens in spans(len(targets), shape[0]):
                tile = raw_tile(states[tokens], columns, None if bias is None else bias[vocabulary], weight.dtype)
                shrink, exponentials = softmax.rows(tokens).fold_(tile, targets[tokens] - vocabulary.start, shaping)
                del tile
                add_product_(pull[tokens].mul_(shrink[:, None]), exponentials, columns)
                del exponentials
        pull.div_(-softmax.total[:, None]).add_(weight[targets]).mul_(shaping.scale / shaping.temperature)
        ctx.save_for_backward(pull)
        ctx.dtype = states.dtype
        entropy = softmax.entropy()
        ctx.mark_non_differentiable(entropy)
        return softmax.logprobs(), entropy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_logprobs: Float[Tensor, " n"], grad_entropy: Float[Tensor, " n"]
    ) -> tuple[Tensor | None, ...]:
        """The vectors that forward left, times what each token's log-prob is worth."""
        del grad_entropy
        (pull,) = ctx.saved_tensors
        return (pull * grad_logprobs[:, None]).to(ctx.dtype), None, None, None, None, None
