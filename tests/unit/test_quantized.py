"""Packed linears: codes and bytes by hand, products against the plain linear, what they keep, what a copy shares."""

import copy
import json
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from hydra_rlhf.errors import ConfigError, ModelError
from hydra_rlhf.model import quantized

FORMATS = ["nf4", "int8"]
# The 16 values of NF4 (Dettmers et al. 2023, appendix E): quantiles of a normal distribution, as shares of the largest.
NF4 = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]


def plain(kind: str = "Linear", dtype: torch.dtype = torch.float32, outs: int = 24, ins: int = 40) -> nn.Module:
    """A linear with spread weights; its shape is no multiple of a block."""
    generator = torch.Generator().manual_seed(0)
    linear = {"Linear": lambda: nn.Linear(ins, outs), "Conv1D": lambda: Conv1D(outs, ins)}[kind]()
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.normal_(generator=generator)
    return linear.to(dtype)


def as_rows(linear: nn.Module) -> torch.Tensor:
    """The weight as [out, in], whatever the kind."""
    weight = linear.weight.detach()
    return weight if isinstance(linear, nn.Linear) else weight.T


def of_weight(weight: torch.Tensor, format: str):
    """A packed linear of this weight, without bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight)
    return quantized.QuantizedLinear.from_linear(linear, format)


def test_int8_by_hand():
    # Row 1: the largest is 2.54, so a step is 0.02; 1.27 is 63.5 steps, rounded to the even 64; -0.05 is -2.5 -> -2.
    # Row 2 is zero. Row 3: the largest is 12.7 in size, a step is 0.1.
    weight = torch.tensor([[2.54, 1.27, -0.05, 0.011], [0.0, 0.0, 0.0, 0.0], [-12.7, 0.26, 0.04, 12.7]])
    packed = of_weight(weight, "int8")
    assert packed.packed.tolist() == [[127, 64, -2, 1], [0, 0, 0, 0], [-127, 3, 0, 127]]
    assert_close(packed.scale, torch.tensor([0.02, 0.0, 0.1]), atol=1e-7, rtol=0)
    expected = torch.tensor([[2.54, 1.28, -0.04, 0.02], [0.0, 0.0, 0.0, 0.0], [-12.7, 0.3, 0.0, 12.7]])
    assert_close(packed.dequantize(), expected, atol=1e-6, rtol=0)


def test_nf4_by_hand():
    # Every value four times, times 2: each is its own code, the block's scale is 2, and the mean of all scales too.
    values = 2 * torch.tensor(NF4 * 4)
    packed = of_weight(values.view(4, 16), "nf4")
    assert_close(packed.dequantize(), values.view(4, 16), atol=1e-6, rtol=0)
    # Codes 0, 1, ..., 15, two to a byte, the first in the upper half: 0x01, 0x23, ..., 0xef.
    assert packed.packed.flatten().tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * 4
    assert packed.scale_mean.item() == 2.0


def test_nf4_scales_are_packed_around_their_mean():
    # Two blocks with scales 1 and 3: mean 2, so -1 and 1, which 8 bits hold exactly (-1 within its half step, 0.007).
    weight = torch.tensor(NF4 * 4 + [3 * value for value in NF4] * 4).view(8, 16)
    packed = of_weight(weight, "nf4")
    assert (packed.scale_mean.item(), packed.scale_of_scale.tolist()) == (2.0, [1.0])
    assert_close(packed.dequantize(), weight, atol=0.0071, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 16), (48, 96), (64, 64), (5, 22), (3, 7)])
def test_each_weight_is_its_code_times_the_scale_of_its_block(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    packed = of_weight((weight * torch.arange(1, shape[0] + 1)[:, None]).to(dtype), "nf4")
    codes = torch.stack([packed.packed.flatten() >> 4, packed.packed.flatten() & 15], dim=1).flatten().long()
    scales = packed.scale_code[packed.scale.long()] * packed.scale_of_scale[0] + packed.scale_mean
    each = torch.tensor(NF4)[codes[: weight.numel()]] * scales.repeat_interleave(64)[: weight.numel()]
    assert_close(
        packed.dequantize().float(), each.view(shape), atol=1e-6, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_packing_loses_is_bounded(dtype):
    weight = as_rows(plain(dtype=dtype)).float()
    rounding = 0 if dtype == torch.float32 else 2**-8
    # Half a step, 1/254 of the row's largest, and for bf16 scales and results half a spacing each.
    lost = (of_weight(weight.to(dtype), "int8").dequantize().float() - weight).abs()
    assert (lost <= weight.abs().amax(dim=1, keepdim=True) * (1 / 254 + 2 * rounding) + 1e-6).all()
    # Half the widest gap, (1 - 0.6962) / 2 of the block's largest; 2 % more for the scale's own 8 bits.
    lost = (of_weight(weight.to(dtype), "nf4").dequantize().float() - weight).abs().reshape(15, 64)
    assert (lost <= weight.abs().reshape(15, 64).amax(dim=1, keepdim=True) * (0.152 + 0.02 + 2 * rounding)).all()


def test_bf16_int8_unpacks_with_one_rounding():
    packed = of_weight(as_rows(plain(dtype=torch.bfloat16)), "int8")
    assert packed.scale.dtype == torch.bfloat16  # of another dtype, a float32 copy of the weight would be needed
    exact = packed.packed.double() * packed.scale.double()[:, None]
    assert torch.equal(packed.dequantize(), exact.to(torch.bfloat16))


def test_nf4_is_the_librarys_double_quantisation():
    import bitsandbytes.functional as functional

    weight = as_rows(plain(outs=96, ins=200))
    theirs, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    packed = of_weight(weight, "nf4")
    assert torch.equal(packed.packed, theirs)
    assert_close(packed.dequantize(), functional.dequantize_4bit(theirs, state), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_products_and_input_gradients_are_the_unpacked_linears(format, kind):
    packed = quantized.QuantizedLinear.from_linear(plain(kind), format)
    unpacked = packed.to_linear()
    assert (type(unpacked).__name__, unpacked.weight.shape) == (kind, plain(kind).weight.shape)
    x = torch.randn(2, 3, 40, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    out, expected = packed(x), unpacked(twin)
    assert_close(out, expected, atol=1e-5, rtol=1e-5)
    grad = torch.randn(2, 3, 24)
    out.backward(grad)
    expected.backward(grad)
    assert_close(x.grad, twin.grad, atol=1e-5, rtol=1e-5)
    # It is the right weight and bias, and not only the same one twice.
    assert_close(out.detach(), plain(kind)(x).detach(), atol=6.0 if format == "nf4" else 0.4, rtol=0)
    assert torch.equal(packed.bias, plain(kind).bias)
    assert torch.equal(packed.weight, packed.dequantize())


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_kept_for_backward(format):
    packed = quantized.QuantizedLinear.from_linear(plain(), format)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        packed(torch.randn(5, 40, requires_grad=True))
    assert kept == []


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        # 24 x 40 = 960 numbers: 480 bytes of codes, 15 blocks with a byte each, one float32 scale of these, their mean,
        # and the 256 float32 values that their codes stand for.
        ("nf4", 480 + 15 + 4 + 4 + 1024),
        # A byte each, and a float32 scale per row.
        ("int8", 960 + 24 * 4),
    ],
)
def test_bytes_by_hand_and_on_the_meta_device(format, expected, monkeypatch):
    real = quantized.QuantizedLinear.from_linear(plain(), format)
    assert sum(b.nbytes for b in real.buffers()) == expected
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # sizes are known without it
    for kind in ("Linear", "Conv1D"):
        for dtype in (torch.float32, torch.bfloat16):
            meta = quantized.QuantizedLinear.from_linear(plain(kind, dtype).to("meta"), format)
            if dtype == torch.float32:
                assert shapes(meta) == shapes(real)
            assert meta.device.type == "meta"
            assert (meta.dequantize().shape, meta.dequantize().dtype) == ((24, 40), dtype)


def shapes(module: nn.Module) -> dict:
    """{name: (shape, dtype)} of all that a module holds."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("format", FORMATS)
def test_a_copy_is_equal_and_shares_nothing(format):
    packed = quantized.QuantizedLinear.from_linear(plain(), format)
    twin = copy.deepcopy(packed).to("cpu")
    assert torch.equal(twin.dequantize(), packed.dequantize())
    own = {tensor.data_ptr() for tensor in packed.state_dict().values()}
    assert own.isdisjoint(tensor.data_ptr() for tensor in twin.state_dict().values())
    assert len(own) == len(packed.state_dict())
    assert not any(parameter.requires_grad for parameter in packed.parameters())


@pytest.mark.parametrize("shape", [(1, 3), (3, 5), (7, 33), (300, 70)])
@pytest.mark.parametrize("format", FORMATS)
def test_any_shape_works(format, shape):
    # Odd numbers of weights, and rows that end inside a block.
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed = of_weight(weight, format)
    assert packed.dequantize().shape == shape
    assert (packed.dequantize() - weight).abs().max() <= 0.18 * weight.abs().max()


def test_without_the_library_nf4_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ConfigError, match=r"model.quantization=nf4 needs bitsandbytes: pip install 'hydra-rlhf\[quant\]'"
    ):
        of_weight(torch.ones(4, 16), "nf4")
    of_weight(torch.ones(4, 16), "int8")


def test_unpacking_a_model_puts_every_plain_linear_back():
    model = nn.Sequential(plain(), nn.Sequential(plain("Conv1D", ins=24), nn.LayerNorm(24)))
    kinds = [type(module) for module in model.modules()]
    expected = {}
    for parent, name in ((model, "0"), (model[1], "0")):
        packed = quantized.QuantizedLinear.from_linear(getattr(parent, name), "int8")
        expected[id(parent)] = packed.dequantize()
        setattr(parent, name, packed)
    quantized.unpack_linears(model)
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(as_rows(model[0]), expected[id(model)])
    assert torch.equal(as_rows(model[1][0]), expected[id(model[1])])


BASE = {"path": "org/model", "revision": "main", "commit": None, "quantization": "nf4", "dtype": "bfloat16"}


def test_a_folder_says_which_base_it_belongs_on(tmp_path):
    base = quantized.QuantizedBase(**BASE)
    assert quantized.QuantizedBase.read(tmp_path) is None
    base.write(tmp_path, adapter="adapter")
    assert json.loads((tmp_path / "quantized_base.json").read_text()) == BASE | {"adapter": "adapter"}
    assert quantized.QuantizedBase.read(tmp_path) == (base, tmp_path / "adapter")
    base.write(tmp_path, adapter=None)
    assert quantized.QuantizedBase.read(tmp_path) == (base, None)


@pytest.mark.parametrize("content", ["{", "[]", json.dumps(BASE), json.dumps(BASE | {"adapter": None, "rank": 1})])
def test_a_damaged_description_is_refused(content, tmp_path):
    (tmp_path / "quantized_base.json").write_text(content)
    with pytest.raises(ModelError, match=r"quantized_base.json"):
        quantized.QuantizedBase.read(tmp_path)
