"""Packed copies of weights: the same bits as plain products, bytes to the byte, and nothing left behind."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from hydra_rlhf.model import device, fused, packing
from hydra_rlhf.model.device import has_bfloat16_units as ask_the_machine  # the tests' own answer is put in its place

UNITS = pytest.mark.skipif(not ask_the_machine(torch.device("cpu")), reason="this CPU has no bfloat16 units")
SIZES = st.integers(1, 200)


@pytest.fixture(autouse=True)
def units(monkeypatch: pytest.MonkeyPatch):
    """Those of the machine."""
    monkeypatch.setattr(device, "has_bfloat16_units", ask_the_machine)


def matrix(*shape: int) -> torch.Tensor:
    """Random bfloat16 numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@UNITS
@given(SIZES, SIZES, st.sampled_from([1, 3, 16, 70]), st.booleans())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@torch.no_grad()
def test_packed_products_are_plain_products_bit_for_bit(o: int, i: int, n: int, has_bias: bool):
    weight, x, bias = matrix(o, i), matrix(n, i), matrix(o) if has_bias else None
    assert packing.packed_product(x, weight, bias) is None
    with packing.packed([weight]):
        product = packing.packed_product(x, weight, bias)
        assert product is not None
        assert torch.equal(product, linear(x, weight, bias))
        assert torch.ops.mkldnn._nbytes(weight.packed) == packing.packed_bytes(weight)  # pyright: ignore
    assert packing.packed_product(x, weight, bias) is None


@UNITS
@torch.no_grad()
def test_a_block_of_prompts_and_states_that_are_no_neighbours_in_memory():
    weight = matrix(24, 40)
    block, strided = matrix(3, 7, 40), matrix(40, 9).T
    with packing.packed([weight]):
        assert torch.equal(packing.packed_product(block, weight, None), linear(block, weight))  # pyright: ignore
        assert torch.equal(packing.packed_product(strided, weight, None), linear(strided, weight))  # pyright: ignore


@UNITS
def test_frozen_linears_and_the_head_use_the_copy_without_gradients_only(monkeypatch):
    layer, x, seen = nn.Linear(40, 24).bfloat16(), matrix(3, 40), []
    plain = layer(x)
    real = packing.packed_product

    def watched(*arguments):
        seen.append(real(*arguments))
        return seen[-1]

    monkeypatch.setattr(fused, "packed_product", watched)
    with packing.packed([layer.weight]):
        with torch.no_grad():
            outputs = [
                fused.frozen_output(layer, x),
                fused.frozen_output(layer, x[:, None])[:, 0],
                fused.frozen_product(x, layer.weight, layer.bias),
            ]
            assert [output is not None for output in seen] == [True] * 3
            assert all(torch.equal(output, plain) for output in outputs)
        seen.clear()
        assert fused.frozen_output(layer, x).requires_grad
        assert fused.frozen_product(x, layer.weight, layer.bias).requires_grad
        assert seen == []


@UNITS
def test_copies_are_gone_after_an_error_also_in_the_middle_of_packing():
    good, bad = matrix(8, 8), torch.zeros(8, 8, dtype=torch.bfloat16, device="meta")
    with pytest.raises((NotImplementedError, RuntimeError)), packing.packed([good, bad]):
        pass
    assert not hasattr(good, packing.PACKED)
    with pytest.raises(KeyError), packing.packed([good]):
        raise KeyError
    assert not hasattr(good, packing.PACKED)


@UNITS
def test_what_can_be_packed():
    plain, wide, head = nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4), matrix(9, 4)
    transposed = Conv1D(4, 4).bfloat16()
    found = packing.packable([plain, wide, transposed, nn.Identity()], head, "cpu")
    assert [weight is expected for weight, expected in zip(found, [plain.weight, head], strict=True)] == [True, True]
    assert packing.packable([plain], head, "cuda") == []
    assert packing.packable([plain], head.float(), "cpu")[0] is plain.weight
    assert packing.packable([], head.float(), "cpu") == []


def test_nothing_is_packed_without_units(monkeypatch):
    monkeypatch.setattr(device, "has_bfloat16_units", lambda asked: False)  # noqa: ARG005
    assert not packing.can_pack("cpu", torch.bfloat16)


@pytest.mark.parametrize(("shape", "elements"), [((64, 32), 2048), ((1, 1), 2048), ((65, 32), 4096), ((64, 33), 4096)])
def test_bytes_of_whole_tiles(shape: tuple[int, int], elements: int):
    assert packing.packed_bytes(torch.zeros(shape, dtype=torch.bfloat16)) == 2 * elements
