"""Tiles of tokens x vocabulary: hand numbers, the naive way beside them, what may be allocated, and how much lives."""

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from hydra_rlhf.model import tiled_logprobs
from hydra_rlhf.model.heads import LMHead
from hydra_rlhf.runtime.tensor_bytes import TensorBytes

LN2 = math.log(2)


def tiled(head, states, targets, *, tile_bytes, temperature=1.0, entropy_gradient=False):
    return tiled_logprobs.tiled_logprobs(
        head, states, targets, temperature=temperature, entropy_gradient=entropy_gradient, tile_bytes=tile_bytes
    )


def naive(head, states, targets, temperature=1.0):
    """All logits at once, in at least float32 after a product in the inputs' dtype; torch's own log-softmax."""
    logits = torch.nn.functional.linear(states, head.weight, head.bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logprobs = torch.log_softmax(logits / temperature, dim=1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(dim=1)


def example(num_tokens, vocab, hidden, *, dtype, bias=False, softcap=None, scale=1.0, spread=1.0, seed=0):
    """A head, states and targets, with targets in the first and the last column among them; everything trained."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(num_tokens, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (spread * torch.randn(vocab, hidden, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    offsets = torch.randn(vocab, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (num_tokens,), generator=generator)
    targets[:2] = torch.tensor([0, vocab - 1])[:num_tokens]
    return LMHead(weight=weight, bias=offsets if bias else None, softcap=softcap, scale=scale), states, targets


def results(function, head, states, targets, *, with_entropy=True, **settings):
    """Log-probs, entropy, and the gradients of states, weight and bias of a weighted sum of both."""
    logprobs, entropy = function(head, states, targets, **settings)
    generator = torch.Generator().manual_seed(1)
    by_logprob, by_entropy = torch.randn(2, len(targets), generator=generator, dtype=torch.float64)
    loss = (logprobs * by_logprob).sum() + (entropy * by_entropy).sum() * with_entropy
    leaves = [leaf for leaf in (states, head.weight, head.bias) if leaf is not None]
    return [logprobs.detach(), entropy.detach(), *torch.autograd.grad(loss, leaves)]


def worst_relative(found, expected):
    """The largest difference relative to the largest entry."""
    return ((found.double() - expected.double()).abs().max() / expected.abs().max()).item()


class Outputs(TorchDispatchMode):
    """Every tensor that operations return, as (shape, dtype, whether it is a view of one of `known`)."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.seen: list[tuple[tuple[int, ...], torch.dtype, bool]] = []
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor):
                known = tensor.untyped_storage().data_ptr() in self.known
                self.seen.append((tuple(tensor.shape), tensor.dtype, known))
        return output

    def larger_than(self, num_bytes: int) -> set[tuple[int, ...]]:
        """Shapes of more float32 bytes than these, views of known tensors left out."""
        return {shape for shape, _, known in self.seen if not known and 4 * math.prod(shape) > num_bytes}


# States are the logits themselves: the head is the identity. ln 1, ln 2, ln 1 give probabilities 1/4, 1/2, 1/4.
HAND_TILES = (4, 8, 12, 24, 2**20)  # 1, 2 and 3 columns of one token, 3 columns of two, everything


def identity_head(**changes):
    return LMHead(
        **({"weight": torch.eye(3, dtype=torch.float64), "bias": None, "softcap": None, "scale": 1.0} | changes)
    )


def test_by_hand():
    # Entropy 3/2 ln 2. Gradient of the states = of the logits: [target] - p. Of the head: that times the state.
    by_logit = torch.tensor([[0.75, -0.5, -0.25], [-0.25, 0.5, -0.25], [-0.25, -0.5, 0.75]], dtype=torch.float64)
    for tile_bytes in HAND_TILES:
        states = torch.tensor([[0.0, LN2, 0.0]] * 3, dtype=torch.float64).requires_grad_()
        head = identity_head(weight=torch.eye(3, dtype=torch.float64).requires_grad_())
        logprobs, entropy = tiled(head, states, torch.tensor([0, 1, 2]), tile_bytes=tile_bytes)
        assert_close(logprobs, torch.tensor([-2 * LN2, -LN2, -2 * LN2], dtype=torch.float64), rtol=0, atol=1e-12)
        assert_close(entropy, torch.full((3,), 1.5 * LN2, dtype=torch.float64), rtol=0, atol=1e-12)
        logprobs.sum().backward()
        assert_close(states.grad, by_logit, rtol=0, atol=1e-12)
        # Summed over the three tokens: 0.25, -0.5, 0.25 by logit, times the state (0, ln 2, 0).
        expected = torch.tensor([[0, 0.25, 0], [0, -0.5, 0], [0, 0.25, 0]], dtype=torch.float64) * LN2
        assert_close(head.weight.grad, expected, rtol=0, atol=1e-12)


def test_entropy_gradient_by_hand():
    # -p (log p + entropy): ln(2) / 8, -ln(2) / 4, ln(2) / 8; here with a bias that makes the logits, and T = 1/2.
    for tile_bytes in HAND_TILES:
        states = torch.zeros(2, 3, dtype=torch.float64).requires_grad_()
        bias = torch.tensor([0.0, LN2 / 2, 0.0], dtype=torch.float64).requires_grad_()
        head = identity_head(bias=bias)
        _, entropy = tiled(
            head, states, torch.tensor([0, 1]), tile_bytes=tile_bytes, temperature=0.5, entropy_gradient=True
        )
        entropy.sum().backward()
        expected = 2 * torch.tensor([LN2 / 8, -LN2 / 4, LN2 / 8], dtype=torch.float64)
        assert_close(states.grad, expected.expand(2, 3), rtol=0, atol=1e-12)
        assert_close(bias.grad, 2 * expected, rtol=0, atol=1e-12)


def test_against_naive_in_float64():
    for bias, softcap, scale, temperature in (
        (False, None, 1.0, 1.0),
        (True, None, 0.3, 0.7),
        (True, 2.5, 1.0, 1.3),
        (False, 2.5, 0.3, 0.7),
    ):
        head, states, targets = example(7, 13, 4, dtype=torch.float64, bias=bias, softcap=softcap, scale=scale)
        expected = results(naive, head, states, targets, temperature=temperature)
        for tile_bytes in (4, 20, 44, 100, 4 * 7 * 13):
            found = results(
                tiled, head, states, targets, temperature=temperature, entropy_gradient=True, tile_bytes=tile_bytes
            )
            for ours, theirs in zip(found, expected, strict=True):
                assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_against_naive_in_float32():
    # 1e-5 on log-prob and entropy, 1e-5 of the largest entry on gradients. 5003 is prime: the last tile is short.
    for softcap, temperature in ((None, 1.0), (None, 0.7), (8.0, 1.0)):
        head, states, targets = example(70, 5003, 32, dtype=torch.float32, bias=True, softcap=softcap, spread=0.5)
        expected = results(naive, head, states, targets, temperature=temperature)
        assert expected[0].min() < -10  # nothing of this is nearly uniform
        found = results(tiled, head, states, targets, temperature=temperature, entropy_gradient=True, tile_bytes=2**16)
        for ours, theirs in zip(found[:2], expected[:2], strict=True):
            assert ours.dtype == torch.float32
            assert_close(ours, theirs, rtol=0, atol=1e-5)
        assert max(map(worst_relative, found[2:], expected[2:])) <= 1e-5


@functools.cache
def bfloat16_errors():
    """Errors of the naive way and of tiles against float64 on the same bfloat16 numbers, as {name: (naive, tiled)}."""
    head, states, targets = example(64, 3001, 64, dtype=torch.bfloat16, spread=0.5)
    exact_head = LMHead(head.weight.detach().double().requires_grad_(), None, None, 1.0)
    exact = results(naive, exact_head, states.detach().double().requires_grad_(), targets)
    plain = results(naive, head, states, targets)
    ours = results(tiled, head, states, targets, entropy_gradient=True, tile_bytes=2**16)
    assert [x.dtype for x in ours] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    names = ("logprob", "entropy", "states", "weight")
    return {
        name: tuple((x.double() - truth).abs().mean().item() for x in pair)
        for name, truth, *pair in zip(names, exact, plain, ours, strict=True)
    }


def test_bfloat16_is_no_less_exact_than_naive_bfloat16():
    errors = bfloat16_errors()
    assert all(ours <= plain for plain, ours in errors.values()), errors


def test_bfloat16_logits_are_not_rounded():
    # Logits of some 10 rounded to 8 bits are off by 0.02; in float32 what is left is the sum's own rounding.
    plain, ours = bfloat16_errors()["logprob"]
    assert plain > 1e-3
    assert ours < 1e-5


def test_a_product_of_half_precision_is_float32():
    # 257 ones: bfloat16 has only 256 and 258 near it.
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        ones = torch.ones(1, 257, dtype=dtype)
        total = tiled_logprobs.product(ones, ones.T)
        assert total.dtype == torch.float32
        assert total.item() == 257
        tiled_logprobs.add_product_(total, ones, ones.T)
        assert total.item() == 514
    assert tiled_logprobs.product(torch.ones(1, 2).double(), torch.ones(2, 1).double()).dtype == torch.float64


def test_a_tile_of_half_precision_is_exact():
    # 1 + 2**-7 squared is 1 + 2**-6 + 2**-14: bfloat16 units multiply exactly and sum in float32. What was not bfloat16
    # before it was widened, here 1 + 2**-12, is not handed to them.
    half = torch.full((8, 64), 1 + 2**-7, dtype=torch.bfloat16)
    tile = tiled_logprobs.raw_tile(half, tiled_logprobs.widened(half), None, torch.bfloat16)
    assert_close(tile, torch.full((8, 8), 64 * (1 + 2**-6 + 2**-14)), rtol=0, atol=0)
    single = torch.full((8, 64), 1 + 2**-12)
    for states, dtype in ((single, torch.float32), (half, torch.float32)):
        tile = tiled_logprobs.raw_tile(states, single, None, dtype)
        assert_close(tile, 64 * (states.float()[:, :8] * (1 + 2**-12)), rtol=2**-22, atol=0)
    assert torch.backends.mkldnn.matmul.fp32_precision == "none", "other products have changed"


def test_gradients_are_summed_in_float32():
    # 128 columns of one tile each, the target's weight 1 + 2**-7 and the others 1. The gradient of the one state (0, so
    # p = 1/128) is the target's weight less the mean weight, 2**-7 (1 - 1/128). A bfloat16 sum of the 128 shares, which
    # starts at 1.0078 and takes away 0.0078 at a time, is rounded to 8 bits every time and ends elsewhere.
    weight = torch.ones(128, 1, dtype=torch.bfloat16)
    weight[0] += 2**-7
    states = torch.zeros(1, 1, dtype=torch.bfloat16).requires_grad_()
    logprobs, _ = tiled(LMHead(weight, None, None, 1.0), states, torch.tensor([0]), tile_bytes=4)
    logprobs.sum().backward()
    assert_close(states.grad.item(), 2**-7 * (1 - 1 / 128), rtol=2**-8, atol=0)
    # The same for the head: 128 tokens of one tile each, all states 1, half of them with this target: 64 - 128 p.
    states = torch.ones(128, 1, dtype=torch.bfloat16)
    head = LMHead(torch.zeros(3, 1, dtype=torch.bfloat16).requires_grad_(), None, None, 1.0)
    logprobs, _ = tiled(head, states, torch.arange(128) % 2, tile_bytes=4)
    logprobs.sum().backward()
    expected = torch.tensor([[64 - 128 / 3], [64 - 128 / 3], [-128 / 3]])
    assert_close(head.weight.grad.float(), expected, rtol=2**-8, atol=0)


def test_no_token_and_one_token():
    for num_tokens in (0, 1):
        for dtype in (torch.float64, torch.bfloat16):
            head, states, targets = example(num_tokens, 13, 4, dtype=dtype, bias=True)
            for tile_bytes in (4, 20, 2**20):
                found = results(tiled, head, states, targets, entropy_gradient=True, tile_bytes=tile_bytes)
                assert [x.shape for x in found] == [(num_tokens,), (num_tokens,), (num_tokens, 4), (13, 4), (13,)]
                assert all(x.isfinite().all() for x in found)
                assert (found[3].abs().sum() > 0) == (num_tokens > 0)


def test_huge_logits_and_a_small_temperature():
    head, states, targets = example(9, 301, 8, dtype=torch.float32, spread=3000.0)
    assert (states @ head.weight.T).abs().max() > 1e4
    for temperature in (1.0, 1e-3):
        found = results(tiled, head, states, targets, temperature=temperature, entropy_gradient=True, tile_bytes=256)
        assert all(x.isfinite().all() for x in found)
        logits = (states @ head.weight.T).detach().double() / temperature
        expected = logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(dim=1)
        assert expected.min() < -1e4
        assert_close(found[0].double(), expected, rtol=1e-6, atol=1e-3)
        assert found[0].max() <= 0
        assert found[1].min() >= 0


def test_without_a_graph_the_numbers_are_the_same_bits():
    for dtype in (torch.float32, torch.bfloat16):
        head, states, targets = example(50, 301, 8, dtype=dtype, softcap=5.0)
        with torch.no_grad():
            scored = tiled(head, states, targets, temperature=0.9, tile_bytes=2048)
        assert not scored[0].requires_grad
        for entropy_gradient in (False, True):
            logprobs, entropy = tiled(
                head, states, targets, temperature=0.9, entropy_gradient=entropy_gradient, tile_bytes=2048
            )
            assert torch.equal(logprobs, scored[0])
            assert torch.equal(entropy, scored[1])
            assert logprobs.requires_grad
            assert entropy.requires_grad == entropy_gradient


def test_only_what_is_asked_for_gets_a_gradient():
    # A product per tile in forward, one in backward, and one per gradient asked for.
    for trained, num_products in (((True, False), 3), ((False, True), 3), ((True, True), 4)):
        head, states, targets = example(50, 64, 8, dtype=torch.float32, bias=True)
        states.requires_grad_(trained[0])
        head.weight.requires_grad_(trained[1])
        with Outputs() as outputs:
            logprobs, _ = tiled(head, states, targets, tile_bytes=4 * 32 * 20)
            logprobs.sum().backward()
        rows, columns = tiled_logprobs.tile_shape(50, 64, 4 * 32 * 20)
        assert outputs.products == num_products * math.ceil(50 / rows) * math.ceil(64 / columns)
        assert ((states.grad is None), (head.weight.grad is None)) == (not trained[0], not trained[1])
        assert head.bias.grad is not None


def test_nothing_larger_than_a_tile_is_made():
    # 40 tokens x 509 columns; a tile may have 1024 entries. The states have 320, so all that is larger is the head's.
    num_tokens, vocab, hidden, tile_bytes = 40, 509, 8, 4096
    for dtype in (torch.float32, torch.bfloat16):
        for trained in ("frozen", "head", "tied"):
            head, states, targets = example(num_tokens, vocab, hidden, dtype=dtype, softcap=5.0, scale=0.5)
            head.weight.requires_grad_(trained != "frozen")
            with Outputs(head.weight) as outputs:
                if trained == "tied":
                    states = torch.nn.functional.embedding(torch.arange(num_tokens), head.weight)
                logprobs, entropy = tiled(head, states, targets, tile_bytes=tile_bytes, entropy_gradient=True)
                (logprobs + entropy).sum().backward()
            allowed = set() if trained == "frozen" else {(vocab, hidden)}  # the gradient of the head itself
            assert outputs.larger_than(tile_bytes) <= allowed
            wide_heads = [shape for shape, kind, _ in outputs.seen if shape == (vocab, hidden) and kind != dtype]
            assert not wide_heads
            assert head.weight.requires_grad == (head.weight.grad is not None)
    with Outputs(head.weight) as outputs:
        naive(head, states, targets)
    assert (num_tokens, vocab) in outputs.larger_than(tile_bytes)  # so it would have been seen


def test_two_tiles_live_at_once():
    head, states, targets = example(400, 1009, 8, dtype=torch.float32, softcap=5.0, scale=0.5)
    head.weight.requires_grad_(False)
    rows, columns = tiled_logprobs.tile_shape(400, 1009, 2**16)
    assert 4 * rows * columns > 2**16 * 0.85
    per_state = 4 * 8 * 400
    for entropy_gradient in (False, True):
        with TensorBytes() as count:
            count.hold([head.weight, states, targets])
            before = count.live
            logprobs, entropy = tiled(
                head, states, targets, temperature=0.7, entropy_gradient=entropy_gradient, tile_bytes=2**16
            )
            forward = count.peak - before
            kept = count.live - before
            count.restart()
            loss = (logprobs + entropy).sum()
            del logprobs, entropy
            loss.backward()
            backward = count.peak - before
        # Kept: four statistics, two results. On top of two tiles: a few numbers per token, and the states' gradient.
        assert kept == 6 * 4 * 400
        assert 1.9 * 2**16 * 0.85 < forward <= 2 * 2**16 + 12 * 4 * 400
        assert backward <= 2 * 2**16 + 24 * 4 * 400 + 1.5 * per_state


def test_runs_without_numbers():
    # The memory plan runs it on the meta device, where nothing may depend on a value.
    head, states, targets = example(50, 301, 8, dtype=torch.bfloat16, bias=True, softcap=5.0)
    weight, bias, states = (x.detach().to("meta").requires_grad_() for x in (head.weight, head.bias, states))
    logprobs, entropy = tiled(
        LMHead(weight, bias, 5.0, 1.0), states, targets.to("meta"), entropy_gradient=True, tile_bytes=2048
    )
    (logprobs + entropy).sum().backward()
    assert states.grad.shape == states.shape
    assert weight.grad.shape == weight.shape


def test_tile_shapes_by_hand():
    for case, expected in {
        # 2**23 entries: sqrt(8 * 2**23) = 8192 columns, 1024 tokens.
        (1024, 49152, 2**25): (1024, 8192),
        (8192, 49152, 2**25): (1024, 8192),
        # Fewer tokens, more columns: 2**23 / 100 = 83886, down to a multiple of 64.
        (100, 151936, 2**25): (100, 83840),
        # A small vocabulary whole: 2**23 / 300 = 27962 tokens at a time, 30000 in two even tiles.
        (30_000, 300, 2**25): (15_000, 300),
        # 1025 tokens are two tiles of even height, not 1024 and 1; 2**23 / 513 = 16352, down to a multiple of 64.
        (1025, 49152, 2**25): (513, 16320),
        (0, 300, 64): (1, 16),
        (5, 300, 4): (1, 1),
    }.items():
        assert tiled_logprobs.tile_shape(*case) == expected


def test_tiles_stay_within_their_bytes_and_are_not_much_smaller():
    for num_tokens in (1, 7, 100, 1000, 5000):
        for vocab in (1, 13, 300, 50257, 262144):
            for tile_bytes in (4, 100, 2**12, 2**20, 2**25):
                rows, columns = tiled_logprobs.tile_shape(num_tokens, vocab, tile_bytes)
                assert 1 <= rows <= num_tokens
                assert 1 <= columns <= vocab
                assert 4 * rows * columns <= tile_bytes
                assert 4 * rows * columns >= 0.45 * min(tile_bytes, 4 * num_tokens * vocab)


def test_spans_cover_everything_once():
    assert list(tiled_logprobs.spans(7, 3)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(tiled_logprobs.spans(6, 3)) == [slice(0, 3), slice(3, 6)]
    assert list(tiled_logprobs.spans(0, 3)) == []
