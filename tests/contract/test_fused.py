"""Fused layers against the plain ones they stand for: equal outputs, equal gradients, and fewer bytes kept."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig

from contract.tiny import CONFIGS, LORA, ragged_batch
from hydra_rlhf.model import attention
from hydra_rlhf.model.fuse import eps_of, fuse_layers, norm_offset
from hydra_rlhf.model.fused import frozen_output
from hydra_rlhf.model.load import attention_implementation, to_dtype, without_dropout
from hydra_rlhf.model.lora import LoraLinear
from hydra_rlhf.model.trunk import Trunk

FAMILIES = [name for name in CONFIGS if name != "gemma2"]  # its attention mask overflows in float64


def plain_lora(self: LoraLinear, x: Tensor) -> Tensor:
    """The reference: y + scale * B A x, by autograd."""
    y = self.linear(x)
    for name in self.switch.stack:
        A, B = self.lora_A[name].to(x.dtype), self.lora_B[name].to(x.dtype)
        y = y + self.scale[name] * F.linear(F.linear(x, A), B)
    return y


def exact_norm(self: Any, x: Tensor, offset: float) -> Tensor:
    """A norm's own output with the formula's gradient: transformers' norms round to float32, forward and backward."""
    formula = (offset + self.weight) * x * (x.square().mean(dim=-1, keepdim=True) + eps_of(self)).rsqrt()
    return formula + (type(self).forward(self, x) - formula).detach()


def trunk_of(
    family: str,
    dtype: torch.dtype,
    *,
    plain: bool,
    targets: tuple[str, ...] = ("all-linear",),
    exact_norms: bool = False,
) -> Trunk:
    """A random model with two LoRA sets that do something; `plain`: transformers' own modules and `sdpa`."""
    config = copy.deepcopy(CONFIGS[family])
    without_dropout(config)
    torch.manual_seed(0)
    implementation = "sdpa" if plain else attention_implementation(config)
    trunk = Trunk(to_dtype(AutoModelForCausalLM.from_config(config, attn_implementation=implementation), dtype))
    for name in ("below", "actor"):
        trunk.add_adapter(name, rank=3, alpha=6.0, targets=targets, dtype=dtype, seed_of=lambda path: len(path))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trunk.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, 0.3, generator=generator)
    if plain:
        for module in trunk.modules():
            if "forward" in vars(module):
                del module.forward
        for module in trunk.modules():
            if "RMSNorm" in type(module).__name__ and exact_norms:
                module.forward = partial(exact_norm, module, offset=float(family.startswith("gemma")))
        for linear in trunk.lora_linears.values():
            linear.forward = partial(plain_lora, linear)
    return trunk


def gradients(trunk: Trunk, adapter: str, trained: Callable[[Trunk], dict[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Output and gradients of a loss over the real tokens."""
    batch = ragged_batch()
    trunk.requires_grad_(False)
    parameters = trained(trunk)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    hidden = trunk.hidden_states(batch.tokens, batch.attention_mask, adapter=adapter)[batch.attention_mask]
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view(hidden.shape)
    (hidden * weights).sum().backward()
    found = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    return {"output": hidden.detach(), **found}


def lora_set(trunk: Trunk) -> dict[str, nn.Parameter]:
    """The actor's LoRA set."""
    return trunk.adapter_parameters("actor")


def all_weights(trunk: Trunk) -> dict[str, nn.Parameter]:
    """Every weight of the base."""
    return trunk.base_parameters()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal to `tolerance` of each tensor's largest entry."""
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        error = (found[name] - reference).abs().max()
        assert error <= tolerance * reference.abs().max().clamp(min=1e-30), name


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "v_proj")])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_adapter_gradients_equal_the_plain_layers(family: str, targets: tuple[str, ...]) -> None:
    """In float64 to 1e-10, with one LoRA set and with two stacked; the output in float32 bit for bit without one."""
    if family == "gpt2" and targets != ("all-linear",):
        targets = ("c_attn",)
    make = partial(trunk_of, family, torch.float64, targets=targets, exact_norms=True)
    assert_equal(gradients(make(plain=False), "actor", lora_set), gradients(make(plain=True), "actor", lora_set), 1e-10)
    stacked = [make(plain=plain) for plain in (False, True)]
    for trunk in stacked:
        trunk.keep_below("below")
    found, expected = (gradients(trunk, "actor", lora_set) for trunk in stacked)
    assert_equal(found, expected, 1e-10)
    alone = gradients(make(plain=False), "actor", lora_set)
    assert not torch.allclose(found["output"], alone["output"]), "the set below the actor's changes nothing"


@pytest.mark.parametrize("grad", [False, True])
def test_linears_that_turn_out_to_read_different_inputs(grad: bool) -> None:
    """q, k and v run together; one that gets an input of its own gets its own output, and from then on runs alone."""
    trunk = trunk_of("llama", torch.float64, plain=False)
    q, k, v = (trunk.lora_linears[f"layers.0.self_attn.{name}_proj"] for name in "qkv")
    x, other = (torch.randn(2, 3, q.linear.in_features, dtype=torch.float64, requires_grad=grad) for _ in range(2))
    for _ in range(2):
        with torch.set_grad_enabled(grad), trunk.switch.use("actor"):
            outputs = [q(x), k(other), v(x)]
            expected = [plain_lora(q, x), plain_lora(k, other), plain_lora(v, x)]
        for found, reference in zip(outputs, expected, strict=True):
            assert_close(found, reference)
        assert not trunk.switch.waiting
    assert k.shared is not q.shared
    assert q.shared is v.shared


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models_train_as_plain_ones(family: str) -> None:
    """Full fine-tuning runs through the same norms and MLPs."""
    found = gradients(trunk_of(family, torch.float64, plain=False), None, all_weights)  # pyright: ignore
    expected = gradients(trunk_of(family, torch.float64, plain=True), None, all_weights)  # pyright: ignore
    assert_equal(found, expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_lora_off_is_the_plain_model_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    """Nothing that is fused may change what the base computes."""
    batch = ragged_batch()
    config = copy.deepcopy(CONFIGS[family])
    without_dropout(config)
    torch.manual_seed(0)
    model = to_dtype(
        AutoModelForCausalLM.from_config(config, attn_implementation=attention_implementation(config)), dtype
    )
    reference = copy.deepcopy(model)
    if model.config._attn_implementation == attention.NAME:
        reference.set_attn_implementation("sdpa")
    trunk = Trunk(model)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found = trunk.hidden_states(batch.tokens, batch.attention_mask, adapter=None)
            expected = reference.base_model(
                input_ids=batch.tokens,
                attention_mask=batch.attention_mask.long(),
                position_ids=(batch.attention_mask.long().cumsum(1) - 1).clamp(min=0),
            ).last_hidden_state
            assert torch.equal(found[batch.attention_mask], expected[batch.attention_mask])


def kept_bytes(trunk: Trunk, num_tokens: int) -> float:
    """Bytes of activations that autograd keeps per token, each storage once, weights and masks left out."""
    known = {p.untyped_storage().data_ptr() for p in [*trunk.parameters(), *trunk.buffers()]}
    seen: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known and x.dim() > 1:
            seen[storage.data_ptr()] = storage.nbytes()
        alive.append(x)
        return x

    alive: list[Any] = []
    tokens = torch.zeros(1, num_tokens, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        hidden = trunk.hidden_states(tokens, torch.ones_like(tokens, dtype=torch.bool), adapter="actor")
    del hidden
    return sum(seen.values()) / num_tokens


def ideal_bytes(config: LlamaConfig, rank: int, width: int, *, all_linear: bool) -> int:
    """What a layer must keep per token: its input, the LoRA inputs, q, k, v, the attention's output, gate and up."""
    d, ff = config.hidden_size, config.intermediate_size
    head = d // config.num_attention_heads
    q, k = config.num_attention_heads * head, config.num_key_value_heads * head
    kept = d + d + q + 2 * k + q + d + 2 * ff + 4 * rank
    return width * (kept + (d + ff + 3 * rank if all_linear else 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [("q_proj", "k_proj", "v_proj", "o_proj"), ("all-linear",)])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_a_layer_keeps_no_more_than_it_must(dtype: torch.dtype, targets: tuple[str, ...], kv_heads: int) -> None:
    """At most 1.10 times the ideal, measured with saved-tensor hooks between two depths; adapters are float32."""
    per_depth = []
    for num_layers in (2, 4):
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=num_layers,
            num_attention_heads=8,
            num_key_value_heads=kv_heads,
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
        trunk = Trunk(to_dtype(model, dtype))
        trunk.add_adapter("actor", rank=LORA.rank, alpha=4.0, targets=targets, dtype=torch.float32, seed_of=len)
        per_depth.append(kept_bytes(trunk, 256))
    kept = (per_depth[1] - per_depth[0]) / 2
    ideal = ideal_bytes(config, LORA.rank, dtype.itemsize, all_linear=len(targets) == 1)
    assert kept <= 1.10 * ideal, f"{kept:.0f} bytes per token and layer, {kept / ideal:.3f} of the ideal"
    assert kept >= 0.7 * ideal, "fewer bytes than backward needs: the measurement misses something"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 16, 128, 129])
def test_decoded_rows_get_the_plain_product(rows: int, bias: bool):
    """Within rounding where the product is turned round, and bit for bit where it is not: one row, many, other dtypes,
    whole sequences, and wherever a graph is made."""
    generator = torch.Generator().manual_seed(rows)
    linear = torch.nn.Linear(48, 40, bias=bias).requires_grad_(False)
    x = torch.randn(rows, 1, 48, generator=generator)
    with torch.no_grad():
        found, plain = frozen_output(linear, x), linear(x)
        assert_close(found, plain, atol=1e-5, rtol=1e-5)
        assert found.is_contiguous()
        if rows in (1, 129):
            assert torch.equal(found, plain)
        sequences = torch.randn(3, 5, 48, generator=generator)
        assert torch.equal(frozen_output(linear, sequences), linear(sequences))
        half = torch.nn.Linear(48, 40, bias=bias, dtype=torch.bfloat16)
        assert torch.equal(frozen_output(half, x.bfloat16()), half(x.bfloat16()))
    assert torch.equal(frozen_output(linear, x), linear(x))


@pytest.mark.parametrize("family", list(CONFIGS))
def test_every_rms_norm_is_known(family: str) -> None:
    """So that none of them goes the slow way; a norm that computes something else is not taken for one of them."""
    trunk = trunk_of(family, torch.float32, plain=False)
    norms = [module for module in trunk.modules() if "RMSNorm" in type(module).__name__]
    offsets = {module.norm_offset for module in norms}
    assert offsets == ({1.0} if family.startswith("gemma") else {0.0} if norms else set())


def test_other_norms_are_not_taken_for_known_ones() -> None:
    class HalfRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return (0.5 + self.weight) * x * (x.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()

    class NoEps(HalfRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x * x.square().mean(dim=-1, keepdim=True).rsqrt()

    class Gated(HalfRMSNorm):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return x * gate

    class NoWeight(HalfRMSNorm):
        def __init__(self) -> None:
            super().__init__()
            del self.weight

    before = torch.get_rng_state()
    assert norm_offset(Gated()) is None
    assert norm_offset(NoWeight()) is None
    assert norm_offset(HalfRMSNorm()) is None
    assert norm_offset(NoEps()) is None
    assert norm_offset(nn.RMSNorm(8, eps=1e-6)) == 0.0
    assert norm_offset(nn.RMSNorm(8)) is None  # its eps depends on the dtype
    assert torch.equal(torch.get_rng_state(), before)


def test_norms_of_one_class_with_and_without_a_weight() -> None:
    """As Gemma 3n has them: the first one of a class says nothing of the others."""

    class SomeRMSNorm(nn.Module):
        def __init__(self, *, with_scale: bool) -> None:
            super().__init__()
            self.eps = 1e-6
            if with_scale:
                self.weight = nn.Parameter(torch.ones(8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            normed = x * (x.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()
            return self.weight * normed if hasattr(self, "weight") else normed

    both = nn.Sequential(SomeRMSNorm(with_scale=True), SomeRMSNorm(with_scale=False))
    fuse_layers(both)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    both(x).sum().backward()
    assert x.grad is not None


def test_gradient_of_a_norm_with_an_offset_in_half_precision() -> None:
    """1 + w is not rounded to bfloat16, as the norm itself does not: else a w below 2^-8 were lost."""

    class OffsetRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.full((64,), 0.0035).bfloat16(), requires_grad=False), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            wide = x.float()
            normed = wide * (wide.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()
            return ((1.0 + self.weight.float()) * normed).type_as(x)

    norm = nn.Sequential(OffsetRMSNorm())
    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(256, 64, generator=generator).bfloat16() for _ in "xw")
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    (norm(expected) * weights).sum().backward()
    fuse_layers(norm)
    (norm(found) * weights).sum().backward()
    assert found.grad is not None
    assert expected.grad is not None
    scale = (found.grad.double() * expected.grad.double()).sum() / expected.grad.double().square().sum()
    assert abs(scale - 1.0) < 1e-3
