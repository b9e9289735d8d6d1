"""Cut a batch into micro-batches by a token budget. A memory knob only: no loss or gradient depends on it."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from hydra_rlhf.records import TokenBatch

Size = tuple[int, int]
"""(prompt tokens, response tokens) of one item. Both are padded, so a group is as wide as both its maxima together."""


def by_token_budget(sizes: Sequence[Size], max_tokens: int) -> list[list[int]]:
    """Group items of these sizes so that each group, padded, stays within `max_tokens`, and groups are alike in size.

    Items are sorted by length (ties by prompt, then position), so groups hold little padding. Filling groups up one
    after the other tells how many are needed; the budget is then lowered as far as that number allows, because what
    counts is the largest group, and a small rest costs as many kernel calls as a full group. An item longer than the
    budget gets a group of its own. Depends on the arguments alone, so a replayed step is cut the same way.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sum(sizes[i]), -sizes[i][0], i))
    ordered = [sizes[i] for i in order]
    num_groups = len(filled_up(ordered, max_tokens))
    budget = bisect_left(range(max_tokens), True, key=lambda tokens: len(filled_up(ordered, tokens)) <= num_groups)
    starts = [*filled_up(ordered, budget), len(order)]
    return [order[start:end] for start, end in pairwise(starts)]


def filled_up(sizes: Sequence[Size], max_tokens: int) -> list[int]:
    """Where groups start if items, in this order, join the last group as long as it stays within `max_tokens`."""
    starts: list[int] = []
    prompt = response = 0
    for i, (own_prompt, own_response) in enumerate(sizes):
        prompt, response = max(prompt, own_prompt), max(response, own_response)
        if not starts or (i - starts[-1] + 1) * (prompt + response) > max_tokens:
            starts.append(i)
            prompt, response = own_prompt, own_response
    return starts


def select_rows(batch: TokenBatch, rows: Int[Tensor, " n"]) -> TokenBatch:
    """Some rows of a batch without the columns that only the others needed, on the left and on the right."""
    mask, response_mask = batch.attention_mask[rows], batch.response_mask[rows]
    border = batch.num_prompt_columns
    first = border - int(mask[:, :border].sum(dim=1).max())
    width = int(response_mask.sum(dim=1).max())
    columns = slice(first, border + width)
    return TokenBatch(
        tokens=batch.tokens[rows, columns],
        attention_mask=mask[:, columns],
        response_mask=response_mask[:, :width],
    )


def micro_batches(
    batch: TokenBatch, max_tokens: int, rows: Sequence[int] | None = None
) -> Iterator[tuple[Int[Tensor, " n"], TokenBatch]]:
    """Yield (row numbers in `batch`, those rows) for all rows, or for the given ones, in whatever order they come.

    Equal sets of rows are cut equally, so that one pass over a whole rollout repeats the scoring pass bit for bit.
    """
    chosen = list(range(len(batch.tokens))) if rows is None else sorted(rows)
    prompts = batch.attention_mask[:, : batch.num_prompt_columns].sum(dim=1).tolist()
    responses = batch.response_mask.sum(dim=1).tolist()
    for group in by_token_budget([(prompts[row], responses[row]) for row in chosen], max_tokens):
        index = torch.tensor([chosen[item] for item in group], device=batch.tokens.device)
        yield index, select_rows(batch, index)
