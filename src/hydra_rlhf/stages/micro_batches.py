"""Cut a batch into micro-batches by a token budget. A memory knob only: no loss or gradient depends on it."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from hydra_rlhf.model.device import call_tokens
from hydra_rlhf.records import TokenBatch

Size = tuple[int, int]
"""(prompt tokens, response tokens) of one item. Both are padded, so a group is as wide as both its maxima together."""


def by_token_budget(sizes: Sequence[Size], max_tokens: int, call_tokens: int) -> list[list[int]]:
    """Group items of these sizes at the least cost, where no group, padded, has more than `max_tokens`.

    A group costs its padded tokens and `call_tokens` more. Items are sorted by length (ties by prompt, then position)
    and groups are neighbours in that order; of equally cheap ways to cut it, the one with the smallest largest group
    is taken. An item longer than `max_tokens` gets a group of its own. Depends on the arguments alone, so a replayed
    step is cut the same way.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sum(sizes[i]), -sizes[i][0], i))
    starts = cheapest_starts([sizes[i] for i in order], max_tokens, call_tokens)
    return [order[start:end] for start, end in pairwise([*starts, len(order)])]


def cheapest_starts(sizes: Sequence[Size], max_tokens: int, call_tokens: int) -> list[int]:
    """Where groups of neighbours start in the cheapest cut, found for ever more items (dynamic programming)."""
    best = [(0, 0)]  # (cost, tokens of the largest group) of the first 0, 1, 2, ... items
    last_start: list[int] = []  # of the last group in the cheapest cut of the first 1, 2, ... items
    for end in range(1, len(sizes) + 1):
        found: list[tuple[int, int, int]] = []
        prompt = response = 0
        for start in range(end - 1, -1, -1):
            prompt, response = max(prompt, sizes[start][0]), max(response, sizes[start][1])
            tokens = (end - start) * (prompt + response)
            if found and tokens > max_tokens:
                break
            cost, largest = best[start]
            found.append((cost + tokens + call_tokens, max(largest, tokens), start))
        cost, largest, start = min(found)
        best.append((cost, largest))
        last_start.append(start)
    starts: list[int] = []
    end = len(sizes)
    while end > 0:
        end = last_start[end - 1]
        starts.append(end)
    return starts[::-1]


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
    device = batch.tokens.device
    sizes = [(prompts[row], responses[row]) for row in chosen]
    for group in by_token_budget(sizes, max_tokens, call_tokens(device)):
        index = torch.tensor([chosen[item] for item in group], device=device)
        yield index, select_rows(batch, index)
