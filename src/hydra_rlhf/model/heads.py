"""The three heads that read a trunk's hidden states: language model, value and reward."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x, W, b) -> x W^T + b."""


class ScalarHead(nn.Module):
    """One number per hidden state, in float32: w . h + bias. Serves as reward head and as value head."""

    def __init__(self, hidden_size: int, *, generator: torch.Generator | None = None) -> None:
        """Weights ~ N(0, 1 / (h + 1)) from `generator` (Stiennon et al. 2020), or zero without one; bias zero."""
        super().__init__()
        weight = torch.zeros(hidden_size)
        if generator is not None:
            weight.normal_(0.0, (hidden_size + 1) ** -0.5, generator=generator)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Float[Tensor, "*n h"]) -> Float[Tensor, "*n"]:
        """[*n, h] hidden states in any dtype -> [*n] numbers in the head's dtype."""
        return hidden.to(self.weight.dtype) @ self.weight + self.bias

    @torch.no_grad()
    def copy_from(self, other: "ScalarHead") -> None:
        """Take over another head's weights: how a critic starts as the reward model."""
        self.weight.copy_(other.weight)
        self.bias.copy_(other.bias)

    @torch.no_grad()
    def shift(self, mean: float) -> None:
        """Subtract `mean` from every output."""
        self.bias.sub_(mean)


@dataclass(frozen=True, slots=True)
class LMHead:
    """A view of the language-model head: its (possibly tied) weight and what the family does to its logits."""

    weight: Float[Tensor, "v h"]
    bias: Float[Tensor, " v"] | None
    softcap: float | None
    """Logits are held in (-softcap, softcap) by a tanh (Gemma 2)."""
    scale: float
    """Logits are multiplied by this (Cohere's logit_scale, the inverse of Granite's logits_scaling)."""

    @property
    def vocab_size(self) -> int:
        """v: how many tokens have a logit."""
        return len(self.weight)

    def logits(self, hidden: Float[Tensor, "n h"], product: Product = F.linear) -> Float[Tensor, "n v"]:
        """Logits in at least float32; the `product` with the weight runs in the base's dtype."""
        logits = product(hidden, self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits
