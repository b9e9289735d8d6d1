"""What a token counts in the policy's loss, by its response: 1 for all is the mean over the minibatch's tokens.

Losses are sums over tokens divided by `num_tokens`; these weights make another mean of it. They are worked out from the
counts of the whole minibatch (`num_responses`, `num_tokens`), so the cut into micro-batches changes nothing.
"""

import torch
from jaxtyping import Float64, Int
from torch import Tensor


def response_mean_weights(lengths: Int[Tensor, " b"], *, num_responses: int, num_tokens: int) -> Float64[Tensor, " b"]:
    """The loss becomes the mean over responses of each response's own token mean (GRPO: Shao et al. 2024, equation 3).

    So a token of a long response counts less than one of a short response. `lengths` are in tokens.
    """
    return num_tokens / (num_responses * lengths.double())


def full_length_weights(
    lengths: Int[Tensor, " b"], *, num_responses: int, num_tokens: int, max_tokens: int
) -> Float64[Tensor, " b"]:
    """The loss becomes the sum over tokens / those that full-length responses would have (Dr. GRPO: Liu et al. 2025).

    Every token counts alike, whatever its response and its minibatch. `max_tokens` is the most a response may have.
    """
    return torch.full_like(lengths, num_tokens / (num_responses * max_tokens), dtype=torch.float64)
