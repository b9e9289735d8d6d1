"""Attention beside softmax(scale * Q K^T + mask) V written out: one query to a row, and half precision's backward."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from hydra_rlhf.model import attention

SHAPES = [(1, 1), (4, 1), (6, 2), (3, 3)]
"""(heads, groups)."""


def inputs(heads: int, groups: int, *, queries: int, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Three rows of query, key and value; keys and values are views of wider storage, as a cache gives them."""
    generator = torch.Generator().manual_seed(heads + 10 * queries)
    query = torch.randn(3, queries, heads, 8, generator=generator).to(dtype).transpose(1, 2)
    key, value = (torch.randn(3, groups, keys + 5, 8, generator=generator).to(dtype)[:, :, 2 : keys + 2] for _ in "kv")
    return query, key, value


def left_padding(keys: int, queries: int, dtype: torch.dtype) -> Tensor:
    """An additive causal mask of rows that begin at columns 0, 1 and 3; hidden columns get the dtype's least number."""
    columns = torch.arange(keys)
    seen = (columns >= torch.tensor([0, 1, 3])[:, None, None]) & (columns <= torch.arange(keys)[-queries:, None])
    seen |= columns == torch.arange(keys)[-queries:, None]  # padding sees itself
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """[b, q, h, d] in float64."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = scaling * query.double() @ key.mT
    return ((scores if mask is None else scores + mask.double()).softmax(dim=-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("tile_bytes", [1, 2**20])
@pytest.mark.parametrize("heads_groups", SHAPES)
def test_one_query_per_row(heads_groups, tile_bytes, masked, dtype, monkeypatch):
    monkeypatch.setattr(attention, "TILE_BYTES", tile_bytes)
    query, key, value = inputs(*heads_groups, queries=1, keys=7, dtype=dtype)
    mask = left_padding(7, 1, dtype) if masked else None
    with torch.no_grad():
        found, _ = attention.attend(nn.Module(), query, key, value, mask, scaling=0.3)
    assert found.dtype == dtype
    expected = written_out(query, key, value, mask, 0.3)
    assert_close(found.double(), expected, atol=4e-3 if dtype == torch.bfloat16 else 1e-6, rtol=4e-3)


def test_one_query_has_the_usual_scale_where_none_is_given():
    query, key, value = inputs(4, 2, queries=1, keys=7, dtype=torch.float32)
    with torch.no_grad():
        found, _ = attention.attend(nn.Module(), query, key, value, None)
    assert_close(found.double(), written_out(query, key, value, None, 8**-0.5), atol=1e-6, rtol=0)


def test_one_query_per_row_makes_nothing_above_a_tile(monkeypatch):
    """Keys of all rows in float32 would take 3 * 2 * 64 * 8 * 4 = 12,288 bytes, those of one row a third of it."""
    query, key, value = inputs(4, 2, queries=1, keys=64, dtype=torch.bfloat16)
    made: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            made.append(output.untyped_storage().nbytes() if func is torch.ops.aten._to_copy.default else 0)
            return output

    monkeypatch.setattr(attention, "TILE_BYTES", 9000)
    with torch.no_grad(), Sizes():
        attention.attend(nn.Module(), query, key, value, None)
    assert max(made) == 64 * 2 * 8 * 4


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("tile_bytes", [1, 2000, 2**20], ids=["groups", "rows", "everything"])
@pytest.mark.parametrize("heads_groups", SHAPES)
def test_half_precision_gradients(heads_groups, tile_bytes, masked, monkeypatch):
    """As float64 gives them on the same rounded numbers, up to the rounding of what comes out."""
    monkeypatch.setattr(attention, "TILE_BYTES", tile_bytes)
    tensors = inputs(*heads_groups, queries=7, keys=7, dtype=torch.bfloat16)
    halves = [x.detach().requires_grad_() for x in tensors]
    wides = [x.detach().double().requires_grad_() for x in tensors]
    mask = left_padding(7, 7, torch.bfloat16) if masked else None
    causal = torch.full((7, 7), -torch.inf).triu(1)
    weights = torch.randn(3, 7, heads_groups[0], 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, _ = attention.attend(nn.Module(), *halves, mask, scaling=0.3)
    found.backward(weights)
    expected = written_out(*wides, causal if mask is None else mask, 0.3)
    expected.backward(weights.double())
    assert_close(found.double(), expected, atol=1e-2, rtol=1e-2)
    for half, wide in zip(halves, wides, strict=True):
        assert half.grad is not None
        assert half.grad.dtype == torch.bfloat16
        assert wide.grad is not None
        assert_close(half.grad.double(), wide.grad, atol=2e-2 * wide.grad.abs().max().item(), rtol=1e-2)


def test_one_mask_for_all_rows(monkeypatch):
    """However the rows are tiled, forward of one query and backward of many."""
    monkeypatch.setattr(attention, "TILE_BYTES", 1)
    query, key, value = inputs(4, 2, queries=1, keys=7, dtype=torch.float32)
    mask = left_padding(7, 1, torch.float32)[2:]
    with torch.no_grad():
        found, _ = attention.attend(nn.Module(), query, key, value, mask, scaling=0.3)
    assert_close(found.double(), written_out(query, key, value, mask, 0.3), atol=1e-6, rtol=0)
    tensors = [x.detach().requires_grad_() for x in inputs(4, 2, queries=7, keys=7, dtype=torch.bfloat16)]
    wides = [x.detach().double().requires_grad_() for x in tensors]
    mask = left_padding(7, 7, torch.bfloat16)[2:]
    attention.attend(nn.Module(), *tensors, mask, scaling=0.3)[0].sum().backward()
    written_out(*wides, mask, 0.3).sum().backward()
    for half, wide in zip(tensors, wides, strict=True):
        assert half.grad is not None
        assert wide.grad is not None
        assert_close(half.grad.double(), wide.grad, atol=2e-2 * wide.grad.abs().max().item(), rtol=1e-2)


def test_a_mask_for_each_head():
    """As position biases make them: left to the fused kernel, one query or many."""
    for queries, dtype in ((1, torch.float32), (7, torch.bfloat16)):
        query, key, value = inputs(4, 2, queries=queries, keys=7, dtype=dtype)
        mask = torch.randn(3, 4, queries, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
        with torch.set_grad_enabled(queries > 1):
            found, _ = attention.attend(nn.Module(), query, key, value, mask, scaling=0.3)
        assert_close(found.double(), written_out(query, key, value, mask, 0.3), atol=2e-2, rtol=1e-2)
