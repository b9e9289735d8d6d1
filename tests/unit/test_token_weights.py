"""What a token counts in the policy's loss, against examples worked out by hand."""

import pytest
import torch
from torch.testing import assert_close

from hydra_rlhf.algorithms import token_weights

LENGTHS = torch.tensor([2, 4])


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def test_mean_over_responses():
    # 6 tokens of 2 responses: 6 / (2 * 2) = 1.5 and 6 / (2 * 4) = 0.75. A response's tokens together are
    # 2 * 1.5 / 6 = 4 * 0.75 / 6 = 1/2 of the loss.
    weights = token_weights.response_mean_weights(LENGTHS, num_responses=2, num_tokens=6)
    assert_close(weights, f64([1.5, 0.75]))
    assert_close(LENGTHS * weights / 6, f64([0.5, 0.5]))


def test_mean_over_responses_of_a_larger_minibatch():
    # The same two in a minibatch of 3 responses and 9 tokens: 9 / (3 * 2) and 9 / (3 * 4).
    weights = token_weights.response_mean_weights(LENGTHS, num_responses=3, num_tokens=9)
    assert_close(weights, f64([1.5, 0.75]))
    weights = token_weights.response_mean_weights(LENGTHS, num_responses=3, num_tokens=12)
    assert_close(weights, f64([2.0, 1.0]))


def test_sum_over_full_length():
    # At most 8 tokens: 6 / (2 * 8) = 0.375 each, so that each token is 0.375 / 6 = 1 / 16 of the loss.
    weights = token_weights.full_length_weights(LENGTHS, num_responses=2, num_tokens=6, max_tokens=8)
    assert_close(weights, f64([0.375, 0.375]))


@pytest.mark.parametrize(("num_responses", "num_tokens", "weight"), [(2, 16, 1.0), (4, 16, 0.5), (2, 4, 0.25)])
def test_a_token_of_a_full_minibatch_counts_one(num_responses: int, num_tokens: int, weight: float):
    weights = token_weights.full_length_weights(
        torch.tensor([8, 1, 3]), num_responses=num_responses, num_tokens=num_tokens, max_tokens=8
    )
    assert_close(weights, f64([weight] * 3))
