"""Padding and masks, compared with blocks written out by hand."""

import pytest
import torch

from hydra_rlhf.data.collate import collate_demonstrations, collate_pairs, collate_responses, left_pad_prompts
from hydra_rlhf.data.formats import TokenizedDemonstration, TokenizedPair, TokenizedPrompt


def test_prompts_are_pushed_right_and_responses_left():
    batch = collate_responses([[1, 2], [3]], [[4, 9], [5, 6, 7]], pad_id=0)
    assert batch.tokens.tolist() == [[1, 2, 4, 9, 0], [0, 3, 5, 6, 7]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    assert batch.response_mask.int().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.num_prompt_columns == 2
    assert batch.tokens.dtype == torch.int64


def test_masks_do_not_depend_on_the_padding_id():
    # 9 is the stop token here and a real token of both rows.
    plain = collate_responses([[1, 2], [9]], [[9], [5, 9]], pad_id=0)
    as_eos = collate_responses([[1, 2], [9]], [[9], [5, 9]], pad_id=9)
    assert torch.equal(plain.attention_mask, as_eos.attention_mask)
    assert torch.equal(plain.response_mask, as_eos.response_mask)
    assert as_eos.tokens.tolist() == [[1, 2, 9, 9], [9, 9, 5, 9]]


def test_pairs_are_all_chosen_rows_and_then_all_rejected_rows():
    pairs = [TokenizedPair([1], [10, 11], [12]), TokenizedPair([2, 3], [13], [14, 15, 16])]
    batch = collate_pairs(pairs)
    assert batch.tokens.tolist() == [
        [0, 1, 10, 11, 0],
        [2, 3, 13, 0, 0],
        [0, 1, 12, 0, 0],
        [2, 3, 14, 15, 16],
    ]
    assert batch.response_mask.int().tolist() == [[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]]


def test_demonstrations():
    batch = collate_demonstrations([TokenizedDemonstration([1], [2, 3]), TokenizedDemonstration([4, 5], [6])], 8)
    assert batch.tokens.tolist() == [[8, 1, 2, 3], [4, 5, 6, 8]]


def test_prompts_are_repeated_for_their_samples():
    prompts = [TokenizedPrompt([1, 2, 3], "one", {"answer": 4}), TokenizedPrompt([5], "two", {"id": 7})]
    batch = left_pad_prompts(prompts, [30, 40], samples_per_prompt=2)
    assert batch.tokens.tolist() == [[1, 2, 3], [1, 2, 3], [0, 0, 5], [0, 0, 5]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 1], [0, 0, 1]]
    assert batch.prompt_index.tolist() == [30, 30, 40, 40]
    assert batch.sample_index.tolist() == [0, 1, 0, 1]
    assert batch.texts == ["one", "one", "two", "two"]
    assert batch.columns == {"answer": [4, 4, None, None], "id": [None, None, 7, 7]}


@pytest.mark.parametrize(("prompts", "responses"), [([[1]], [[]]), ([[]], [[1]]), ([], []), ([[1]], [[1], [2]])])
def test_rows_without_tokens_are_refused(prompts, responses):
    with pytest.raises(AssertionError):
        collate_responses(prompts, responses)
