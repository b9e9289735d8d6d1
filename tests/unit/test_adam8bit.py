"""AdamW with 8-bit moments: steps and bytes by hand, and beside torch's own AdamW."""

import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hydra_rlhf.errors import ConfigError
from hydra_rlhf.runtime import adam8bit

BIG = 4096 + 300  # the smallest tensors are kept in 32 bits; 17.2 blocks of 256


def build(*parameters: nn.Parameter, rate: float = 0.1, weight_decay: float = 0.0):
    """An optimizer over these parameters, with fresh state."""
    groups = [{"params": list(parameters), "lr": rate}]
    optimizer = adam8bit.AdamW8bit(groups, betas=(0.9, 0.95), weight_decay=weight_decay, setting="optimizer=adamw-8bit")
    for parameter in parameters:
        optimizer.state[parameter] = optimizer.fresh_state(parameter)
    return optimizer


def test_two_steps_by_hand():
    # As in 32 bits: 1 * (1 - 0.1 * 0.5) - 0.1 = 0.85 after g = 1. A block of equal numbers is its scale times 1, which
    # 8 bits hold exactly. Then g = 0: 0.85 * 0.95 - 0.1 * (0.09 / 0.19) / sqrt(0.0475 / 0.0975) = 0.7396352.
    a = nn.Parameter(torch.ones(BIG))
    optimizer = build(a, weight_decay=0.5)
    a.grad = torch.ones(BIG)
    optimizer.step()
    assert a.grad is None
    assert_close(a.detach(), torch.full((BIG,), 0.85), atol=1e-6, rtol=0)
    a.grad = torch.zeros(BIG)
    optimizer.step()
    assert_close(a.detach(), torch.full((BIG,), 0.7396352), atol=1e-6, rtol=0)
    assert optimizer.state[a]["step"].item() == 2
    # m = 0.1 * 0.9, v = 0.05 * 0.95: the scales, since every code is 1.
    assert_close(optimizer.state[a]["exp_avg_scale"], torch.full((18,), 0.09), atol=1e-7, rtol=0)
    assert_close(optimizer.state[a]["exp_avg_sq_scale"], torch.full((18,), 0.0475), atol=1e-7, rtol=0)


def test_bytes_by_hand():
    # Two bytes per number, two float32 scales per block of 256 (18 blocks), a float32 step count.
    big, small = nn.Parameter(torch.ones(BIG)), nn.Parameter(torch.ones(4095))
    optimizer = build(big, small)
    assert sum(tensor.nbytes for tensor in optimizer.state[big].values()) == 2 * BIG + 2 * 18 * 4 + 4
    assert sum(tensor.nbytes for tensor in optimizer.state[small].values()) == 2 * 4095 * 4 + 4
    # The first size that is packed is the one the library packs from.
    assert build(nn.Parameter(torch.ones(4096))).state_dict()["state"][0]["exp_avg"].dtype == torch.uint8


def test_the_state_is_whole_before_the_first_step():
    a = nn.Parameter(torch.ones(BIG))
    optimizer = build(a)
    before = {name: (tensor.shape, tensor.dtype) for name, tensor in optimizer.state[a].items()}
    pointers = {name: tensor.data_ptr() for name, tensor in optimizer.state[a].items()}
    a.grad = torch.ones(BIG)
    optimizer.step()
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in optimizer.state[a].items()} == before
    assert {name: tensor.data_ptr() for name, tensor in optimizer.state[a].items()} == pointers


def test_twenty_steps_beside_32_bits():
    # Constant gradients in [0.5, 1]: in 32 bits every step is the rate, 20 steps are 20 rates.
    # Signed codes lie 0.9 / 64 apart between 0.1 and 1, so a moment of at least half its block's largest is off by at
    # most 0.00703 / 0.5 = 1.4 % each time it is packed, and 9 times that in all (0.9 + 0.81 + ...): 12.7 %.
    # Unsigned codes lie 0.9 / 128 apart; squares are at least a quarter: 1.4 % again, 19 times that in all: 27 %.
    # A step is between (1 - 0.127) / sqrt(1.27) = 0.77 and 1.127 / sqrt(0.73) = 1.32 rates, 20 steps within 6.4 rates.
    gradient = 0.5 + 0.5 * torch.rand(BIG, generator=torch.Generator().manual_seed(0))
    gradient *= torch.where(torch.arange(BIG) % 2 == 0, 1.0, -1.0)
    ours, theirs = nn.Parameter(torch.zeros(BIG)), nn.Parameter(torch.zeros(BIG))
    packed = build(ours, rate=1.0)
    reference = torch.optim.AdamW([theirs], lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(20):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        packed.step()
        reference.step()
    assert_close(theirs.detach(), -20 * gradient.sign(), atol=1e-3, rtol=0)
    difference = (ours - theirs).detach().abs()
    assert difference.max() <= 6.4
    assert difference.mean() <= 1.0
    assert difference.max() > 0, "these should be 8 bits"


def test_small_tensors_step_as_torchs_do():
    ours, theirs = nn.Parameter(torch.linspace(-1, 1, 100)), nn.Parameter(torch.linspace(-1, 1, 100))
    packed = build(ours, weight_decay=0.3)
    reference = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), weight_decay=0.3)
    for seed in range(3):
        gradient = torch.randn(100, generator=torch.Generator().manual_seed(seed))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        packed.step()
        reference.step()
    assert torch.equal(ours, theirs)


def test_weights_stored_transposed_step_the_same():
    weight = torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(50, 100, generator=torch.Generator().manual_seed(1))
    rows, columns = nn.Parameter(weight.clone()), nn.Parameter(weight.t().contiguous().t())
    assert not columns.is_contiguous()
    for parameter, grad in ((rows, gradient), (columns, gradient.t().contiguous().t())):
        optimizer = build(parameter)
        for _ in range(2):
            parameter.grad = grad.clone(memory_format=torch.preserve_format)
            optimizer.step()
    assert torch.equal(rows, columns)
    assert not torch.equal(rows, weight)


def test_parameters_without_a_gradient_are_left_alone():
    a, b = nn.Parameter(torch.ones(BIG)), nn.Parameter(torch.ones(BIG))
    optimizer = build(a, b, weight_decay=0.5)
    a.grad = torch.ones(BIG)
    optimizer.step()
    assert torch.equal(b, torch.ones(BIG))
    assert optimizer.state[b]["step"].item() == 0
    assert not torch.equal(a, torch.ones(BIG))


def test_without_the_library_the_setting_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ConfigError, match=r"optimizer=adamw-8bit needs bitsandbytes: pip install 'hydra-rlhf\[quant\]'"
    ):
        build(nn.Parameter(torch.ones(BIG)))
