"""One sweep of a frozen head: the plain way beside it, the two-sweep way bit for bit, and what may be allocated."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from hydra_rlhf.model import swept_logprobs
from hydra_rlhf.model.heads import LMHead
from hydra_rlhf.model.logprobs import direct_logprobs
from hydra_rlhf.model.tiled_logprobs import tiled_logprobs
from hydra_rlhf.runtime.tensor_bytes import TensorBytes

VOCAB = 137
"""No multiple of a tile's width."""


def example(num_tokens=23, *, dtype=torch.float64, bias=True, scale=0.5, seed=0):
    """A frozen head, states that learn, targets in the first and the last column among them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    head = LMHead(weight=normal(VOCAB, 12), bias=normal(VOCAB) if bias else None, softcap=None, scale=scale)
    targets = torch.randint(VOCAB, (num_tokens,), generator=generator)
    targets[:2] = torch.tensor([0, VOCAB - 1])[:num_tokens]
    return head, normal(num_tokens, 12).requires_grad_(), targets


def gradient(logprobs, states):
    """Of a weighted sum of log-probs."""
    weights = torch.linspace(-1.0, 2.0, len(logprobs), dtype=torch.float64)
    return torch.autograd.grad((logprobs * weights).sum(), states)[0]


def test_by_hand():
    # One state 1, a head of columns 0 and 1: logits 0 and 1. p = 1 / (1 + e) and e / (1 + e).
    # Target 1: log-prob -log(1 + 1/e), gradient W[1] - p_1 W[1] = 1 / (1 + e).
    head = LMHead(weight=torch.tensor([[0.0], [1.0]]), bias=None, softcap=None, scale=1.0)
    states = torch.tensor([[1.0]], requires_grad=True)
    logprobs, entropy = swept_logprobs.swept_logprobs(head, states, torch.tensor([1]), temperature=1.0, tile_bytes=4)
    p = 1 / (1 + math.e)
    assert_close(logprobs, torch.tensor([-math.log(1 + 1 / math.e)]))
    assert_close(entropy, torch.tensor([-p * math.log(p) - (1 - p) * math.log(1 - p)]))
    assert_close(torch.autograd.grad(logprobs.sum(), states)[0], torch.tensor([[p]]))


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tile_bytes", [40, 4 * 50, 4 * 7 * VOCAB, 10**6])
def test_against_all_logits_at_once(tile_bytes, bias, temperature):
    head, states, targets = example(bias=bias)
    expected, entropy = direct_logprobs(head, states, targets, temperature=temperature, entropy_gradient=False)
    found, found_entropy = swept_logprobs.swept_logprobs(
        head, states, targets, temperature=temperature, tile_bytes=tile_bytes
    )
    assert_close(found, expected, atol=1e-10, rtol=0)
    assert_close(found_entropy, entropy, atol=1e-10, rtol=0)
    assert_close(gradient(found, states), gradient(expected, states), atol=1e-10, rtol=0)
    assert not found_entropy.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_without_a_graph_gives_the_same_bits(dtype):
    """Old log-probs come from two-sweep tiles without a graph: a ratio must be exactly one."""
    head, states, targets = example(200, dtype=dtype, bias=False)
    found, entropy = swept_logprobs.swept_logprobs(head, states, targets, temperature=0.7, tile_bytes=4 * 900)
    with torch.no_grad():
        old, old_entropy = tiled_logprobs(
            head, states, targets, temperature=0.7, entropy_gradient=False, tile_bytes=4 * 900
        )
    assert torch.equal(found, old)
    assert torch.equal(entropy, old_entropy)


def test_half_precision_states_get_a_gradient_summed_in_float32():
    head, states, targets = example(64, dtype=torch.bfloat16, bias=False)
    found, _ = swept_logprobs.swept_logprobs(head, states, targets, temperature=1.0, tile_bytes=4 * 200)
    exact = replace(head, weight=head.weight.double())
    wide = states.detach().double().requires_grad_()
    expected, _ = direct_logprobs(exact, wide, targets, temperature=1.0, entropy_gradient=False)
    assert_close(found.double(), expected, atol=1e-5, rtol=0)
    rounding = 2**-8  # of the result alone, once
    wanted = gradient(expected, wide)
    assert_close(gradient(found, states).double(), wanted, atol=1e-5, rtol=rounding)


def test_huge_logits_stay_finite():
    head, states, targets = example(8, dtype=torch.float32, scale=1e4)
    found, _ = swept_logprobs.swept_logprobs(head, states, targets, temperature=1e-3, tile_bytes=400)
    assert bool(found.isfinite().all())
    assert bool(gradient(found, states).isfinite().all())


def test_two_tiles_live_at_once():
    tile_bytes = 2**16
    generator = torch.Generator().manual_seed(0)
    head = LMHead(weight=torch.randn(2048, 8, generator=generator), bias=None, softcap=None, scale=1.0)
    states = torch.randn(256, 8, generator=generator).requires_grad_()
    targets = torch.randint(2048, (256,), generator=generator)
    with TensorBytes("cpu") as count:
        count.hold([head.weight, states, targets])
        before = count.live
        swept_logprobs.swept_logprobs(head, states, targets, temperature=1.0, tile_bytes=tile_bytes)[0].sum().backward()
        needed = count.peak - before
    small = 256 * 8 * 4 * 4 + 256 * 4 * 16  # a few vectors and numbers per token
    assert needed <= 2 * tile_bytes + small


def test_when_one_sweep_will_do():
    head, states, _ = example()

    def will_do(head=head, states=states, entropy_gradient=False):
        return swept_logprobs.one_sweep_will_do(head, states, entropy_gradient=entropy_gradient)

    assert will_do()
    assert not will_do(states=states.detach())
    assert not will_do(entropy_gradient=True)
    assert not will_do(head=replace(head, softcap=30.0))
    assert not will_do(head=replace(head, weight=head.weight.clone().requires_grad_()))
    assert head.bias is not None
    assert not will_do(head=replace(head, bias=head.bias.clone().requires_grad_()))
    with torch.no_grad():
        assert not will_do()
