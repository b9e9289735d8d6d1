"""The preallocated cache against transformers' growing one: same keys and values, same mask sizes, known bytes."""

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from hydra_rlhf.model import cache

HEADS = {0: (2, 4, 6), 1: (1, 3, 3)}
"""Two layers that differ: {layer: (key-value heads, key width, value width)}."""


def new_columns(num_rows: int, num_columns: int, seed: int, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of new columns."""
    heads, key_width, value_width = HEADS[layer]
    generator = torch.Generator().manual_seed(10 * seed + layer)
    return (
        torch.randn(num_rows, heads, num_columns, key_width, generator=generator),
        torch.randn(num_rows, heads, num_columns, value_width, generator=generator),
    )


def both(num_columns: int) -> tuple[cache.PreallocatedCache, DynamicCache]:
    """Ours and the reference."""
    return cache.PreallocatedCache(num_columns), DynamicCache()


def feed(ours, reference, num_rows: int, num_columns: int, seed: int) -> None:
    """Give both the same new columns and compare what they return."""
    for layer in HEADS:
        keys, values = new_columns(num_rows, num_columns, seed, layer)
        expected = reference.update(keys.clone(), values.clone(), layer)
        for found, wanted in zip(ours.update(keys, values, layer), expected, strict=True):
            assert torch.equal(found, wanted)


def test_rows_that_leave_are_gone():
    ours, _ = both(4)
    keys, values = torch.arange(3.0).reshape(3, 1, 1, 1), 10 * torch.arange(3.0).reshape(3, 1, 1, 1)
    ours.update(keys, values, 0)
    ours.batch_select_indices(torch.tensor([0, 2]))
    assert ours.layers[0].keys.flatten().tolist() == [0, 2]
    assert ours.layers[0].values.flatten().tolist() == [0, 20]


def test_it_holds_what_a_growing_cache_holds():
    """A prompt, tokens one by one, rows that leave twice in between, up to the last column."""
    ours, reference = both(9)
    assert ours.get_seq_length() == 0
    assert ours.get_mask_sizes(4, 0) == reference.get_mask_sizes(4, 0) == (4, 0)
    feed(ours, reference, 5, 4, seed=0)
    feed(ours, reference, 5, 1, seed=1)
    for seed, kept in ((2, [0, 2, 4]), (3, [1, 2])):
        ours.batch_select_indices(torch.tensor(kept))
        reference.batch_select_indices(torch.tensor(kept))
        feed(ours, reference, len(kept), 1, seed)
        for layer in HEADS:
            assert ours.get_seq_length(layer) == reference.get_seq_length(layer)
            assert ours.get_mask_sizes(1, layer) == reference.get_mask_sizes(1, layer)
    assert ours.is_sliding == reference.is_sliding == [False, False]
    feed(ours, reference, 2, 2, seed=5)
    assert ours.get_seq_length() == 9


def test_rows_move_within_the_storage():
    ours, reference = both(6)
    feed(ours, reference, 4, 3, seed=0)
    before = [layer.keys.untyped_storage().data_ptr() for layer in ours.layers]
    for kept in ([1, 3], [1]):
        ours.batch_select_indices(torch.tensor(kept))
        reference.batch_select_indices(torch.tensor(kept))
        for layer, wanted in zip(ours.layers, reference.layers, strict=True):
            assert torch.equal(layer.keys, wanted.keys)
            assert torch.equal(layer.values, wanted.values)
    feed(ours, reference, 1, 3, seed=1)
    assert [layer.keys.untyped_storage().data_ptr() for layer in ours.layers] == before


def test_bytes_are_those_of_the_formula_from_the_first_token_on():
    # 3 rows x 2 heads x 7 columns x (4 + 6) numbers + 3 rows x 1 head x 7 columns x (3 + 3) numbers, 4 bytes each.
    ours, reference = both(7)
    assert ours.num_bytes == 0
    feed(ours, reference, 3, 2, seed=0)
    assert ours.num_bytes == (3 * 2 * 7 * 10 + 3 * 1 * 7 * 6) * 4
    feed(ours, reference, 3, 5, seed=1)
    assert ours.num_bytes == (3 * 2 * 7 * 10 + 3 * 1 * 7 * 6) * 4
    # Where layers are alike: 2 x layers x rows x heads x columns x width x bytes, here 2 x 5 x 3 x 2 x 7 x 4 x 2.
    expected = 3360
    sizes = {"num_layers": 5, "num_rows": 3, "num_kv_heads": 2, "num_columns": 7, "head_dim": 4, "itemsize": 2}
    assert cache.cache_bytes(**sizes) == expected
    alike = cache.PreallocatedCache(7)
    for layer in range(5):
        alike.update(torch.zeros(3, 2, 1, 4).bfloat16(), torch.zeros(3, 2, 1, 4).bfloat16(), layer)
    assert alike.num_bytes == expected


def test_what_is_returned_is_a_view():
    ours = cache.PreallocatedCache(8)
    first, _ = ours.update(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4), 0)
    second, _ = ours.update(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4), 0)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert torch.equal(second[:, :, :3], torch.ones(2, 1, 3, 4))
    assert not second[:, :, 3].any()


def test_the_callers_tensors_are_not_kept():
    ours = cache.PreallocatedCache(4)
    keys = torch.ones(1, 1, 2, 3)
    ours.update(keys, keys, 0)
    keys.zero_()
    assert ours.layers[0].keys.min() == 1


def test_keys_of_other_forms_work():
    """Without a dimension of heads, say."""
    ours, reference = cache.PreallocatedCache(5), DynamicCache()
    for num_columns in (3, 1):
        keys, values = torch.randn(2, num_columns, 6), torch.randn(2, num_columns, 2)
        for found, wanted in zip(ours.update(keys, values, 0), reference.update(keys, values, 0), strict=True):
            assert torch.equal(found, wanted)


def test_a_layer_that_nothing_was_written_to_is_left_alone():
    """Some families share keys between layers; the others then stay empty."""
    ours = cache.PreallocatedCache(5)
    ours.update(torch.ones(3, 1, 2, 4), torch.ones(3, 1, 2, 4), 1)
    ours.batch_select_indices(torch.tensor([2]))
    assert ours.layers[0].get_seq_length() == 0
    assert ours.layers[1].keys.shape == (1, 1, 2, 4)
    assert ours.num_bytes == 3 * 1 * 5 * 4 * 2 * 4


def test_more_columns_than_were_asked_for_are_refused():
    ours = cache.PreallocatedCache(3)
    ours.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    with pytest.raises(AssertionError, match="4 columns in a cache of 3"):
        ours.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), 0)


def join(ours: cache.PreallocatedCache, rows: list[int], prompts: dict[int, tuple[Tensor, Tensor]], stop: int) -> None:
    """One pass over prompts: those of `rows`, in order."""
    with ours.joining(torch.tensor(rows), torch.arange(len(rows)), stop):
        for layer, (keys, values) in prompts.items():
            assert ours.get_seq_length(layer) == 0
            assert ours.get_mask_sizes(keys.shape[-2], layer) == (keys.shape[-2], 0)
            found = ours.update(keys, values, layer)
            assert torch.equal(found[0], keys)
            assert torch.equal(found[1], values)


def prompts_of(num_rows: int, num_columns: int, seed: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values of prompts in each layer."""
    return {layer: new_columns(num_rows, num_columns, seed, layer) for layer in HEADS}


def test_prompts_that_join_lie_left_of_the_column_that_all_write_to():
    ours = cache.PreallocatedCache(8, num_rows=3)
    first = prompts_of(2, 4, seed=0)
    join(ours, [0, 2], first, stop=4)
    steps = prompts_of(3, 1, seed=1)
    for layer, columns in steps.items():
        ours.update(*columns, layer)
    assert ours.get_seq_length() == 5
    later = prompts_of(1, 2, seed=2)
    join(ours, [1], later, stop=5)
    for layer, (keys, values) in prompts_of(3, 1, seed=3).items():
        found_keys, found_values = ours.update(keys, values, layer)
        for found, at in ((found_keys, 0), (found_values, 1)):
            assert found.shape[-2] == 6
            for row, place in ((0, 0), (2, 1)):
                assert torch.equal(found[row, :, :4], first[layer][at][place])
                assert torch.equal(found[row, :, 4:5], steps[layer][at][row])
            assert torch.equal(found[1, :, 3:5], later[layer][at][0])
            assert not found[1, :, :3].any()  # nothing was ever written there, and zeros are safe to be masked
            assert torch.equal(found[:, :, 5:], (keys, values)[at])
    assert ours.num_bytes == (3 * 2 * 8 * 10 + 3 * 1 * 8 * 6) * 4


def test_rows_that_share_a_prompt_share_its_keys():
    ours = cache.PreallocatedCache(4, num_rows=3)
    keys, values = torch.arange(2.0).reshape(2, 1, 1, 1), 10 * torch.arange(2.0).reshape(2, 1, 1, 1)
    with ours.joining(torch.tensor([0, 1, 2]), torch.tensor([1, 0, 1]), 2):
        ours.update(keys, values, 0)
    found, _ = ours.update(torch.full((3, 1, 1, 1), 7.0), torch.full((3, 1, 1, 1), 7.0), 0)
    assert found[:, 0, :, 0].tolist() == [[0, 1, 7], [0, 0, 7], [0, 1, 7]]


def test_columns_that_nobody_needs_are_not_read_and_are_used_again():
    ours = cache.PreallocatedCache(4, num_rows=2)
    keys = torch.arange(8.0).reshape(2, 1, 4, 1)
    ours.update(keys, -keys, 0)
    ours.drop_before(3)
    assert ours.get_seq_length() == 1
    assert ours.get_mask_sizes(1, 0) == (2, 0)
    ours.shift_left(2)
    found_keys, found_values = ours.update(torch.full((2, 1, 1, 1), 9.0), torch.full((2, 1, 1, 1), -9.0), 0)
    assert found_keys[:, 0, :, 0].tolist() == [[3, 9], [7, 9]]
    assert found_values[:, 0, :, 0].tolist() == [[-3, -9], [-7, -9]]
    ours.drop_before(1)
    assert ours.get_seq_length() == 2
    with pytest.raises(AssertionError, match="2 columns asked for, 1 are free"):
        ours.shift_left(2)


def test_a_shift_over_its_own_columns_moves_every_one():
    ours = cache.PreallocatedCache(8, num_rows=1)
    keys = torch.arange(8.0).reshape(1, 1, 8, 1)
    ours.update(keys, keys, 0)
    ours.drop_before(1)
    ours.shift_left(1)
    found, _ = ours.update(torch.full((1, 1, 1, 1), 8.0), torch.full((1, 1, 1, 1), 8.0), 0)
    assert found.flatten().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
