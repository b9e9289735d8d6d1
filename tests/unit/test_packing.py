"""Weights in tiles: the same bits as plain products, the same numbers afterwards, and no second copy."""

import gc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from hydra_rlhf.model import device, packing
from hydra_rlhf.model.adapters import AdapterSwitch, SharedInput, in_tiles
from hydra_rlhf.model.device import has_bfloat16_units as ask_the_machine  # the tests' own answer is put in its place
from hydra_rlhf.model.lora import LoraLinear
from hydra_rlhf.runtime.tensor_bytes import TensorBytes

pytestmark = pytest.mark.skipif(not ask_the_machine(torch.device("cpu")), reason="this CPU has no bfloat16 units")
SIZES = st.integers(1, 200)


@pytest.fixture(autouse=True)
def units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the machine."""
    monkeypatch.setattr(device, "has_bfloat16_units", ask_the_machine)


def layer_of(o: int, i: int, *, bias: bool = False) -> nn.Linear:
    """A frozen linear in bfloat16."""
    return nn.Linear(i, o, bias=bias).bfloat16().requires_grad_(False)


def numbers(*shape: int) -> torch.Tensor:
    """Random ones in bfloat16."""
    return torch.randn(shape).bfloat16()


@given(st.lists(st.tuples(SIZES, st.booleans()), min_size=1, max_size=3), SIZES, SIZES, st.sampled_from([1, 3, 16, 70]))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@torch.no_grad()
def test_products_and_weights_keep_every_bit(outs, r: int, i: int, n: int):
    layers, x, A = [layer_of(o, i, bias=bias) for o, bias in outs], numbers(n, i), torch.randn(r, i)
    before, plain = [layer.weight.clone() for layer in layers], [layer(x) for layer in layers]
    tiles = packing.Tiles.of(layers, [A])
    assert [layer.weight.numel() for layer in layers] == [0] * len(layers)
    *ys, u = tiles.product(x).split([*(o for o, _ in outs), r], dim=1)
    assert all(torch.equal(y, expected) for y, expected in zip(ys, plain, strict=True))
    assert torch.equal(u, linear(x, A.bfloat16()))
    assert torch.ops.mkldnn._nbytes(tiles.matrix) == 2 * (sum(o for o, _ in outs) + r) * i + packing.filler_bytes(
        sum(o for o, _ in outs) + r, i
    )
    tiles.lay_back()
    for layer, weight, expected in zip(layers, before, plain, strict=True):
        assert torch.equal(layer.weight, weight)
        assert layer.weight.untyped_storage().nbytes() == 2 * weight.numel()
        assert torch.equal(layer(x), expected)


def test_if_memory_runs_out_while_laying_out_weights_are_what_they_were(monkeypatch: pytest.MonkeyPatch):
    layers = [layer_of(8, 6), layer_of(4, 6)]
    before = [layer.weight.clone() for layer in layers]

    def fail(weight):
        raise MemoryError

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", fail)
    with pytest.raises(MemoryError):
        packing.Tiles.of(layers, [])
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))


def test_what_can_be_packed(monkeypatch: pytest.MonkeyPatch):
    assert packing.can_pack(layer_of(4, 4), "cpu")
    assert not packing.can_pack(layer_of(4, 4).float(), "cpu")
    assert packing.can_pack(layer_of(4, 4).to("meta"), "cpu")  # a plan asks
    assert not packing.can_pack(layer_of(4, 4), "cuda")
    assert not packing.can_pack(Conv1D(4, 4).bfloat16(), "cpu")
    monkeypatch.setattr(device, "has_bfloat16_units", lambda asked: False)  # noqa: ARG005
    assert not packing.can_pack(layer_of(4, 4), "cpu")


# --- LoRA linears -----------------------------------------------------------------------------------------------------


def lora_layers(count: int = 3, *, names: tuple[str, ...] = ("below", "actor", "critic"), o: int = 12, i: int = 10):
    """LoRA linears that share an input, and their switch; adapters are random and of unlike ranks and scales."""
    switch, shared, generator = AdapterSwitch(), SharedInput(), torch.Generator().manual_seed(0)
    layers = [LoraLinear(layer_of(o + k, i), switch, shared) for k in range(count)]
    for layer in layers:
        for number, name in enumerate(names):
            layer.add_adapter(name, rank=2 + number, alpha=3.0, dtype=torch.float32, generator=generator)
            nn.init.normal_(layer.lora_B[name])
    return layers, switch


@torch.no_grad()
def said(layers, switch: AdapterSwitch, stack: tuple[str, ...], x: torch.Tensor) -> list[torch.Tensor]:
    """What each says of x."""
    with switch._use(stack):
        return [layer(x) for layer in layers]


@pytest.mark.parametrize("stack", [(), ("actor",), ("below", "actor")])
@pytest.mark.parametrize("shape", [(3, 10), (2, 5, 10), (4, 1, 10)])
def test_lora_linears_say_the_same_in_tiles(stack: tuple[str, ...], shape: tuple[int, ...]):
    layers, switch = lora_layers()
    x = numbers(*shape)
    plain = said(layers, switch, stack, x)
    before = [parameter.clone() for layer in layers for parameter in layer.parameters()]
    with in_tiles(layers, stack):
        assert all(layer.weight.numel() == 0 for layer in layers)
        assert all(torch.equal(y, expected) for y, expected in zip(said(layers, switch, stack, x), plain, strict=True))
    after = [parameter for layer in layers for parameter in layer.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(y, expected) for y, expected in zip(said(layers, switch, stack, x), plain, strict=True))


def test_nothing_else_can_be_asked_meanwhile():
    layers, switch = lora_layers()
    x = numbers(3, 10)
    with in_tiles(layers, ("actor",)):
        with pytest.raises(AssertionError, match=r"laid out with the adapters \('actor',\), used with \('critic',\)"):
            said(layers, switch, ("critic",), x)
        with pytest.raises(AssertionError, match="no gradients"), switch._use(("actor",)):
            layers[0](x)
        with pytest.raises(RuntimeError):
            layers[0].linear(x)


def test_linears_that_turn_out_not_to_share_their_input_are_plain_again():
    layers, switch = lora_layers()
    inputs = [numbers(3, 10), numbers(3, 10)]
    plain = [said(layers[k : k + 1], switch, ("actor",), x)[0] for k, x in enumerate(inputs)]
    layers, switch = lora_layers_like(layers)
    with in_tiles(layers, ("actor",)), torch.no_grad(), switch._use(("actor",)):
        found = [layers[k](x) for k, x in enumerate(inputs)]
    assert all(torch.equal(y, expected) for y, expected in zip(found, plain, strict=True))


def lora_layers_like(layers):
    """The same numbers in layers that were never called."""
    copies, switch = lora_layers(len(layers))
    for copy, layer in zip(copies, layers, strict=True):
        copy.load_state_dict(layer.state_dict())
    return copies, switch


def test_a_weight_that_two_linears_share_stays_plain():
    (first, *_), switch = lora_layers(1)
    (second, *_), _ = lora_layers(1)
    second.linear.weight = first.linear.weight  # pyright: ignore[reportAttributeAccessIssue]
    with in_tiles([first, second], ("actor",)):
        assert first.weight.numel() > 0
        said([first], switch, ("actor",), numbers(2, 10))


def test_after_an_error_weights_are_what_they_were():
    layers, _ = lora_layers()
    before = [layer.weight.clone() for layer in layers]
    with pytest.raises(KeyError), in_tiles(layers, ("actor",)):
        raise KeyError
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))


def test_there_is_never_a_second_copy_of_more_than_what_shares_an_input():
    layers = [layer for _ in range(5) for layer in lora_layers(1, names=(), o=64, i=64)[0]]
    gc.collect()
    count = TensorBytes()
    count.hold(layer.weight for layer in layers)
    held = count.live
    with count, in_tiles(layers, ()):
        inside = count.live
    assert (held, inside, count.live) == (5 * 64 * 64 * 2,) * 3
    assert count.peak == 6 * 64 * 64 * 2
