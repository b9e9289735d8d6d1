import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from hydra_rlhf.errors import CheckpointError
from hydra_rlhf.runtime.optimizer import Optimizer, ParamGroup, learning_rate_factor


def parameter(*values: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def build(
    *groups: ParamGroup, max_grad_norm: float = 1e9, weight_decay: float = 0.0, factor=lambda _: 1.0
) -> Optimizer:
    return Optimizer(groups, betas=(0.9, 0.95), weight_decay=weight_decay, max_grad_norm=max_grad_norm, factor=factor)


def two_groups(
    dtype: torch.dtype = torch.float32, max_grad_norm: float = 1e9
) -> tuple[Optimizer, nn.Parameter, nn.Parameter]:
    a, b = parameter(1.0, 2.0, dtype=dtype), parameter(3.0, dtype=dtype)
    optimizer = build(
        ParamGroup("actor/adapter", {"a": a}, 0.1), ParamGroup("value_head", {"b": b}, 0.2), max_grad_norm=max_grad_norm
    )
    return optimizer, a, b


def bits(*tensors: torch.Tensor) -> list[bytes]:
    return [tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


def test_first_step_by_hand():
    # After one step m / (1 - 0.9) = g and v / (1 - 0.95) = g**2, so a parameter moves by rate * g / (|g| + 1e-8),
    # which is the rate against the gradient's sign. Decay first: 1 - 0.1 * 0.5 * 1 = 0.95, then - 0.1.
    a = parameter(1.0, 1.0)
    optimizer = build(ParamGroup("g", {"a": a}, 0.1), weight_decay=0.5)
    a.grad = torch.tensor([3.0, -4.0])
    result = optimizer.step()
    assert_close(a.detach(), torch.tensor([0.85, 1.05]))
    assert (result.grad_norm, result.applied, result.learning_rates) == (5.0, True, {"g": 0.1})
    assert optimizer.num_steps == 1


def test_second_step_by_hand():
    # g = 1, then 0: m = 0.1 * 0.9 = 0.09, over 1 - 0.81 = 0.19; v = 0.05 * 0.95 = 0.0475, over 1 - 0.9025 = 0.0975.
    # (0.09 / 0.19) / sqrt(0.0475 / 0.0975) = 0.4736842 / 0.6979824 = 0.6786478; 1 - 0.1 - 0.06786478 = 0.8321352.
    a = parameter(1.0)
    optimizer = build(ParamGroup("g", {"a": a}, 0.1))
    for gradient in (1.0, 0.0):
        a.grad = torch.tensor([gradient])
        optimizer.step()
    assert_close(a.detach(), torch.tensor([0.8321352]), atol=1e-6, rtol=0)


def test_clipping_is_over_all_groups_and_really_applied():
    # Norm of (2, 4, 4) is 6; clipped to 3 the gradients are (1, 2, 2), and the first moments a tenth of that.
    # (The size of Adam's first step says nothing: it does not depend on the gradient's scale.)
    optimizer, a, b = two_groups(max_grad_norm=3.0)
    a.grad, b.grad = torch.tensor([2.0, 4.0]), torch.tensor([4.0])
    assert optimizer.step().grad_norm == 6.0
    state = optimizer.state()
    assert_close(state["actor/adapter/a/exp_avg"], torch.tensor([0.1, 0.2]), atol=1e-6, rtol=0)
    assert_close(state["value_head/b/exp_avg"], torch.tensor([0.2]), atol=1e-6, rtol=0)


def test_gradients_below_the_norm_are_not_scaled():
    optimizer, a, b = two_groups(max_grad_norm=6.5)
    a.grad, b.grad = torch.tensor([2.0, 4.0]), torch.tensor([4.0])
    optimizer.step()
    assert_close(optimizer.state()["value_head/b/exp_avg"], torch.tensor([0.4]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_changes_no_bit(bad, dtype):
    optimizer, a, b = two_groups(dtype)
    a.grad, b.grad = torch.tensor([1.0, 2.0], dtype=dtype), torch.tensor([1.0], dtype=dtype)
    optimizer.step()
    moments = [tensor for name, tensor in optimizer.state().items() if "/" in name]
    before = bits(a, b, *moments)
    for in_a_row in (1, 2):
        a.grad, b.grad = torch.tensor([1.0, 2.0], dtype=dtype), torch.tensor([bad], dtype=dtype)
        result = optimizer.step()
        assert (result.applied, math.isfinite(result.grad_norm)) == (False, False)
        assert bits(a, b, *moments) == before
        assert (optimizer.num_steps, optimizer.num_skipped, optimizer.num_skipped_in_a_row) == (1, in_a_row, in_a_row)
        assert a.grad is None
    a.grad = torch.tensor([1.0, 2.0], dtype=dtype)
    assert optimizer.step().applied
    assert (optimizer.num_steps, optimizer.num_skipped, optimizer.num_skipped_in_a_row) == (2, 2, 0)
    assert bits(a) != before[:1]


def test_skip_counts_and_drops_gradients():
    optimizer, a, b = two_groups()
    a.grad = torch.tensor([1.0, 1.0])
    before = bits(a, b)
    result = optimizer.skip()
    assert not result.applied
    assert math.isnan(result.grad_norm)
    assert (optimizer.num_skipped_in_a_row, a.grad, bits(a, b)) == (1, None, before)


def test_named_groups_alone_move_and_are_clipped_alone():
    optimizer, a, b = two_groups(max_grad_norm=2.0)
    frozen = bits(a, *(t for name, t in optimizer.state().items() if name.startswith("actor/")))
    a.grad, b.grad = torch.tensor([30.0, 40.0]), torch.tensor([4.0])
    result = optimizer.step({"value_head"})
    # Norm of (4) alone, clipped to 2: the moment is 0.2. The other group's gradient must not wait for the next step.
    assert (result.grad_norm, result.learning_rates) == (4.0, {"value_head": 0.2})
    assert_close(optimizer.state()["value_head/b/exp_avg"], torch.tensor([0.2]), atol=1e-6, rtol=0)
    assert bits(a, *(t for name, t in optimizer.state().items() if name.startswith("actor/"))) == frozen
    assert a.grad is None
    assert_close(b.detach(), torch.tensor([2.8]))


def test_a_bad_gradient_in_a_frozen_group_does_not_matter():
    optimizer, a, b = two_groups()
    a.grad, b.grad = torch.tensor([math.nan, 1.0]), torch.tensor([4.0])
    assert optimizer.step({"value_head"}).applied
    a.grad = torch.tensor([1.0, 1.0])
    assert optimizer.step().applied


def test_a_step_without_any_gradient_is_our_mistake():
    optimizer, a, _ = two_groups()
    a.grad = torch.tensor([1.0, 1.0])
    with pytest.raises(AssertionError, match="no gradient reached"):
        optimizer.step({"value_head"})
    with pytest.raises(AssertionError, match="no such group"):
        optimizer.step({"head"})


def test_bf16_parameters_add_up_steps_smaller_than_their_spacing():
    # bf16 next to 256 is spaced by 1 below and 2 above. Ten steps of 0.1 make 1; each alone would round to nothing.
    a = parameter(256.0, dtype=torch.bfloat16)
    optimizer = build(ParamGroup("g", {"a": a}, 0.1))
    seen = []
    for _ in range(10):
        a.grad = torch.tensor([1.0], dtype=torch.bfloat16)
        optimizer.step()
        seen.append(a.item())
    assert_close(optimizer.state()["g/a/master"], torch.tensor([255.0]), atol=1e-3, rtol=0)
    assert (seen[0], seen[-1], a.dtype) == (256.0, 255.0, torch.bfloat16)


def test_fp32_parameters_have_no_master_copy():
    optimizer, _, _ = two_groups()
    assert sorted(optimizer.state()) == [
        "actor/adapter/a/exp_avg",
        "actor/adapter/a/exp_avg_sq",
        "actor/adapter/a/step",
        "num_skipped",
        "num_skipped_in_a_row",
        "num_steps",
        "value_head/b/exp_avg",
        "value_head/b/exp_avg_sq",
        "value_head/b/step",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_load_next_step_is_bit_equal(dtype, tmp_path):
    def gradients(seed: int, *params: nn.Parameter) -> None:
        source = torch.Generator().manual_seed(seed)
        for param in params:
            param.grad = torch.randn(param.shape, generator=source).to(dtype)

    def fresh() -> tuple[Optimizer, nn.Parameter, nn.Parameter]:
        # The second one is stored transposed, as the weights of some layers are.
        a = nn.Parameter(torch.linspace(-1, 1, 12).to(dtype))
        b = nn.Parameter(torch.linspace(1, 2, 12).reshape(3, 4).t().to(dtype))
        factor = learning_rate_factor("cosine", 2, 9)
        groups = (ParamGroup("x", {"a": a}, 0.03), ParamGroup("y", {"b": b}, 0.01))
        return build(*groups, max_grad_norm=1.0, weight_decay=0.1, factor=factor), a, b

    optimizer, a, b = fresh()
    for seed in range(4):
        gradients(seed, a, b)
        optimizer.step({"y"} if seed == 2 else None)
    a.grad = torch.full_like(a, math.nan)
    optimizer.step()
    save_file(optimizer.state(), tmp_path / "optimizer.safetensors")
    save_file({"a": a.detach(), "b": b.detach().contiguous()}, tmp_path / "model.safetensors")

    other, a2, b2 = fresh()
    weights = load_file(tmp_path / "model.safetensors")
    with torch.no_grad():
        a2.copy_(weights["a"])
        b2.copy_(weights["b"])
    other.load_state(load_file(tmp_path / "optimizer.safetensors"))
    assert (other.num_steps, other.num_skipped, other.num_skipped_in_a_row) == (4, 1, 1)
    for seed in (10, 11):
        gradients(seed, a, b)
        gradients(seed, a2, b2)
        assert optimizer.step() == other.step()
        assert bits(a, b) == bits(a2, b2)
    ours, theirs = optimizer.state(), other.state()
    assert ours.keys() == theirs.keys()
    assert bits(*ours.values()) == bits(*theirs.values())


def test_state_shares_no_memory_between_names_and_is_contiguous():
    weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.bfloat16).t())
    state = build(ParamGroup("g", {"w": weight}, 0.1)).state()
    assert all(tensor.is_contiguous() for tensor in state.values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)


def test_state_of_other_parameters_is_refused_and_nothing_is_loaded():
    optimizer, a, b = two_groups()
    a.grad, b.grad = torch.tensor([1.0, 1.0]), torch.tensor([1.0])
    optimizer.step()
    saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    before = bits(*optimizer.state().values())
    changed = {name: tensor + 1 for name, tensor in saved.items()}

    less = {name: tensor for name, tensor in changed.items() if name != "value_head/b/exp_avg"}
    with pytest.raises(CheckpointError, match=r"1 missing \['value_head/b/exp_avg'\], 0 extra"):
        optimizer.load_state(less)
    with pytest.raises(CheckpointError, match=r"0 missing \[\], 1 extra \['c'\]"):
        optimizer.load_state({**changed, "c": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"value_head/b/exp_avg is torch.float32 \[2\].*\[1\]"):
        optimizer.load_state({**changed, "value_head/b/exp_avg": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"torch.float64 \[1\].*torch.float32"):
        optimizer.load_state({**changed, "value_head/b/exp_avg": torch.zeros(1, dtype=torch.float64)})
    assert bits(*optimizer.state().values()) == before


def test_skipped_steps_do_not_move_the_schedule():
    a = parameter(1.0)
    optimizer = build(ParamGroup("g", {"a": a}, 8.0), factor=learning_rate_factor("constant", 4, 10))
    rates = []
    for gradient in (1.0, math.nan, 1.0):
        a.grad = torch.tensor([gradient])
        rates.append(optimizer.step().learning_rates["g"])
    # 8 * 1/4; 8 * 2/4 twice, because the skipped step did not count.
    assert rates == [2.0, 4.0, 4.0]


def test_schedules_by_hand():
    def rates(schedule: str, warmup_steps: int) -> list[float]:
        factor = learning_rate_factor(schedule, warmup_steps, 6)
        return [round(factor(step), 6) for step in range(8)]

    assert rates("constant", 2) == [0.5, 1, 1, 1, 1, 1, 1, 1]
    # Four steps from 1 at step 2 to 0 at step 6.
    assert rates("linear", 2) == [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    # (1 + cos(45 degrees)) / 2 = 0.853553; 90 degrees: 0.5; 135 degrees: 0.146447.
    assert rates("cosine", 2) == [0.5, 1, 1, 0.853553, 0.5, 0.146447, 0, 0]
    assert rates("linear", 0)[:3] == [1, 0.833333, 0.666667]
    assert rates("constant", 0) == [1] * 8
    # A warm-up as long as the run, and longer.
    assert rates("cosine", 6)[:6] == [round((step + 1) / 6, 6) for step in range(6)]


def test_groups_must_be_told_apart():
    a = parameter(1.0)
    with pytest.raises(AssertionError, match="group names"):
        build(ParamGroup("g", {"a": a}, 1.0), ParamGroup("g", {"b": parameter(1.0)}, 1.0))
    with pytest.raises(AssertionError, match="two groups"):
        build(ParamGroup("g", {"a": a}, 1.0), ParamGroup("h", {"a": a}, 1.0))


def with_8_bits(dtype: torch.dtype) -> tuple[Optimizer, list[nn.Parameter]]:
    """Two large tensors, one of them stored transposed, and a small one that keeps float32 moments."""
    source = torch.Generator().manual_seed(5)
    shapes = {"a": (60, 90), "b": (100, 50), "c": (7,)}
    made = {name: nn.Parameter(torch.randn(shape, generator=source).to(dtype)) for name, shape in shapes.items()}
    made["b"] = nn.Parameter(made["b"].detach().t().contiguous().t())
    groups = (ParamGroup("x", {"a": made["a"]}, 0.03), ParamGroup("y", {"b": made["b"], "c": made["c"]}, 0.01))
    factor = learning_rate_factor("cosine", 2, 9)
    optimizer = Optimizer(
        groups, betas=(0.9, 0.95), weight_decay=0.1, max_grad_norm=1.0, factor=factor, kind="adamw-8bit"
    )
    return optimizer, list(made.values())


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=source).to(param.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_8_bits_save_load_next_step_is_bit_equal(dtype, tmp_path):
    optimizer, params = with_8_bits(dtype)
    names = {name: (tensor.shape, tensor.dtype) for name, tensor in optimizer.state().items()}
    for seed in range(4):
        give_gradients(params, seed)
        optimizer.step({"y"} if seed == 2 else None)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in optimizer.state().items()} == names
    assert ("x/a/master" in names) == (dtype == torch.bfloat16)
    assert all(tensor.is_contiguous() for tensor in optimizer.state().values())
    save_file(optimizer.state(), tmp_path / "optimizer.safetensors")

    other, twins = with_8_bits(dtype)
    with torch.no_grad():
        for twin, param in zip(twins, params, strict=True):
            twin.copy_(param)
    other.load_state(load_file(tmp_path / "optimizer.safetensors"))
    for seed in (10, 11):
        give_gradients(params, seed)
        give_gradients(twins, seed)
        assert optimizer.step() == other.step()
        assert bits(*params) == bits(*twins)
    assert bits(*optimizer.state().values()) == bits(*other.state().values())


def test_in_8_bits_a_gradient_that_is_not_finite_changes_no_bit():
    optimizer, params = with_8_bits(torch.bfloat16)
    give_gradients(params, 0)
    assert optimizer.step().applied
    before = bits(*params, *(tensor for name, tensor in optimizer.state().items() if "/" in name))
    give_gradients(params, 1)
    params[0].grad[3, 3] = math.nan
    assert not optimizer.step().applied
    assert bits(*params, *(tensor for name, tensor in optimizer.state().items() if "/" in name)) == before


def test_in_8_bits_masters_are_rounded_back_into_their_parameters():
    optimizer, params = with_8_bits(torch.bfloat16)
    before = bits(*params)
    give_gradients(params, 0)
    optimizer.step()
    assert all(now != then for now, then in zip(bits(*params), before, strict=True))
    for key, param in zip(("x/a", "y/b", "y/c"), params, strict=True):
        assert torch.equal(optimizer.state()[f"{key}/master"].bfloat16(), param.detach())


def test_state_of_another_kind_of_moments_is_refused():
    optimizer, _ = with_8_bits(torch.float32)
    a = nn.Parameter(torch.zeros(60, 90))
    b, c = nn.Parameter(torch.zeros(100, 50)), nn.Parameter(torch.zeros(7))
    plain = build(ParamGroup("x", {"a": a}, 0.03), ParamGroup("y", {"b": b, "c": c}, 0.01))
    with pytest.raises(CheckpointError, match=r"4 missing .*exp_avg_scale"):
        optimizer.load_state(plain.state())
