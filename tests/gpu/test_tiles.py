"""Logits in tiles on an NVIDIA GPU: half-precision products with float32 results, the Triton kernel, and memory.

HYDRA_RLHF_GPU_TESTS_ON=cpu runs what of it does not need a GPU elsewhere, to see that the tests are right.
"""

import os

import pytest
import torch
from torch.testing import assert_close

from hydra_rlhf.model.heads import LMHead
from hydra_rlhf.model.logprobs import direct_logprobs, token_logprobs
from hydra_rlhf.model.online_softmax import LogitShaping, RunningSoftmax
from hydra_rlhf.model.tiled_logprobs import fold_for, tile_shape

DEVICE = os.environ.get("HYDRA_RLHF_GPU_TESTS_ON", "cuda")
NUM_TOKENS, VOCAB, HIDDEN = 300, 5003, 128
TILE_BYTES = 2**18

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU, not only its tests")


def example(dtype: torch.dtype, softcap: float | None) -> tuple[LMHead, torch.Tensor, torch.Tensor]:
    """A trained head, states and targets on the device; logits of some 5."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(NUM_TOKENS, HIDDEN, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = (0.4 * torch.randn(VOCAB, HIDDEN, generator=generator)).to(DEVICE, dtype).requires_grad_()
    targets = torch.randint(VOCAB, (NUM_TOKENS,), generator=generator).to(DEVICE)
    return LMHead(weight=weight, bias=None, softcap=softcap, scale=1.0), states, targets


def in_float64(head: LMHead, states: torch.Tensor) -> tuple[LMHead, torch.Tensor]:
    """The same numbers, exactly."""
    weight = head.weight.detach().double().requires_grad_()
    return LMHead(weight, None, head.softcap, head.scale), states.detach().double().requires_grad_()


@pytest.mark.parametrize("softcap", [None, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_against_float64(dtype, softcap):
    head, states, targets = example(dtype, softcap)
    exact_head, exact_states = in_float64(head, states)
    exact = direct_logprobs(exact_head, exact_states, targets, temperature=0.8, entropy_gradient=True)
    found = token_logprobs(head, states, targets, temperature=0.8, entropy_gradient=True, tile_bytes=TILE_BYTES)
    for ours, truth in zip(found, exact, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours.double(), truth, rtol=0, atol=3e-5)  # products of half precision are exact, sums float32
    expected = torch.autograd.grad((exact[0] + 0.1 * exact[1]).sum(), (exact_states, exact_head.weight))
    gradients = torch.autograd.grad((found[0] + 0.1 * found[1]).sum(), (states, head.weight))
    for ours, truth in zip(gradients, expected, strict=True):
        worst = (ours.double() - truth).abs().max() / truth.abs().max()
        assert worst <= (1e-5 if dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scoring_and_learning_see_the_same_bits(dtype):
    head, states, targets = example(dtype, 10.0)
    with torch.no_grad():
        old, _ = token_logprobs(head, states, targets, temperature=0.8, tile_bytes=TILE_BYTES)
    new, _ = token_logprobs(head, states, targets, temperature=0.8, tile_bytes=TILE_BYTES)
    assert torch.equal(new, old)


@needs_cuda
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_kernel_is_used_and_agrees_with_plain_torch(softcap):
    pytest.importorskip("triton")
    shaping = LogitShaping(scale=1.3, softcap=softcap, temperature=0.7)
    generator = torch.Generator().manual_seed(0)
    products = (4 * torch.randn(64, 5003, generator=generator)).to(DEVICE)
    targets = torch.randint(5003, (64,), generator=generator).to(DEVICE)
    ours, plain = (RunningSoftmax.empty(64, dtype=torch.float32, device=products.device) for _ in range(2))
    assert fold_for(products) is not RunningSoftmax.fold_
    for start, end in ((0, 2048), (2048, 5003)):
        fold_for(products)(ours, products[:, start:end], targets - start, shaping)
        plain.fold_(products[:, start:end].clone(), targets - start, shaping)
    assert_close(ours.logprobs(), plain.logprobs(), rtol=1e-6, atol=1e-6)
    assert_close(ours.entropy(), plain.entropy(), rtol=1e-6, atol=1e-6)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_tiles_live_at_once(dtype):
    head, states, targets = example(dtype, None)
    head.weight.requires_grad_(False)
    tile_bytes = 2**20
    rows, columns = tile_shape(NUM_TOKENS, VOCAB, tile_bytes)
    assert rows * columns * 4 > 0.8 * tile_bytes
    token_logprobs(head, states, targets, temperature=1.0, tile_bytes=tile_bytes)[0].sum().backward()  # warms up
    states.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_logprobs(head, states, targets, temperature=1.0, tile_bytes=tile_bytes)[0].sum().backward()
    # Two tiles; the gradient of the states in float32, a product to add to it, and a copy in their dtype.
    assert torch.cuda.max_memory_allocated() - before <= 2 * tile_bytes + 3 * 4 * NUM_TOKENS * HIDDEN + 2**17
