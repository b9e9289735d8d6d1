"""Meta operations made from what is known give what torch gives, and the bytes of their storages are counted."""

import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_rlhf.runtime.meta_ops import KnownShapes, MetaBytes
from hydra_rlhf.runtime.tensor_bytes import TensorBytes


def work(x: Tensor, weight: Tensor) -> list[Tensor]:
    """Views, copies, several outputs, in-place operations, other dtypes, and a backward."""
    parts = x.split([2, 4], dim=-1)
    y = F.linear(x, weight).softmax(dim=-1)
    z = y.transpose(0, 1)[1:].reshape(-1)
    values, indices = y.max(dim=-1)
    mixed = torch.cat([parts[0], parts[1].mul(2)], dim=-1).to(torch.bfloat16)
    filled = torch.zeros(3, 4, device=x.device).index_put((torch.tensor([0], device=x.device),), x.new_ones(4))
    total = F.layer_norm(y, (6,)).sum()
    total.backward()
    assert weight.grad is not None
    return [*parts, y, z, values, indices, mixed, filled.add_(1), filled.t_(), x * 1, x.long() * 1.0, weight.grad]


def about(tensors: list[Tensor]) -> list[tuple[object, ...]]:
    """What can be seen of them."""
    return [(x.shape, x.stride(), x.dtype, x.storage_offset(), x.untyped_storage().nbytes()) for x in tensors]


def inputs(device: str) -> tuple[Tensor, Tensor]:
    """x [3, 6] and a weight that learns."""
    return torch.zeros(3, 6, device=device), torch.zeros(6, 6, device=device, requires_grad=True)


def test_outputs_are_those_of_torch_however_often_they_are_made():
    expected = about(work(*inputs("cpu")))
    known: KnownShapes = {}
    for _ in range(3):
        with MetaBytes(known):
            assert about(work(*inputs("meta"))) == expected
    num_known = len(known)
    assert num_known > 20
    with MetaBytes(known):
        work(*inputs("meta"))
    assert len(known) == num_known


def test_bytes_are_those_counted_on_a_real_device():
    def course(count: MetaBytes | TensorBytes, device: str) -> tuple[int, int, int]:
        with count:
            outputs = work(*inputs(device))
            held = count.live
        del outputs
        gc.collect()
        return held, count.peak, count.live

    expected = course(TensorBytes(), "cpu")
    known: KnownShapes = {}
    assert course(MetaBytes(known), "meta") == expected
    assert course(MetaBytes(known), "meta") == expected
    assert expected[2] == 0


def test_views_share_the_storage_of_what_they_are_views_of():
    known: KnownShapes = {}
    for _ in range(2):
        with MetaBytes(known) as count:
            x = torch.empty(8, 4, device="meta")
            column, same = x[:, 1], x.add_(1)
            assert column.untyped_storage()._cdata == x.untyped_storage()._cdata
            assert same is x
            assert count.live == 128


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x * 1, lambda x: x * 1.0),
        (lambda x: x.sum(dim=0), lambda x: x.sum(dim=1)),
        (lambda x: x[:1].expand(3, 5), lambda x: x[:, :1].expand(3, 5)),
        (lambda x: x.to(torch.float32), lambda x: x.to(torch.float64)),
    ],
)
def test_what_looks_alike_is_told_apart(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]):
    real = torch.ones(3, 5, dtype=torch.long)
    with MetaBytes() as count:
        meta = torch.ones(3, 5, dtype=torch.long, device="meta")
        for function in (one, other, one):
            assert about([function(meta)]) == about([function(real)])
    assert count.moments


def test_moments_are_noted_when_something_is_made():
    with MetaBytes() as count:
        a = torch.empty(10, device="meta")
        b = a + 1
        del a
        c = b.view(2, 5)
        c.mul_(2)
        d = torch.empty(5, device="meta")
    assert count.moments == [40, 80, 60]
    assert (count.live, count.peak) == (60, 80)
    count.restart()
    assert (count.moments, count.peak) == ([60], 60)
    del b, c, d
    assert count.live == 0
