"""Cut a batch into micro-batches by a token budget. A memory knob only: no loss or gradient depends on it."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from hydra_rlhf.records import TokenBatch


def by_token_budget(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group items of these lengths so that each group, padded to its longest, stays within `max_tokens`.

    Items are sorted by length (ties by position), so groups hold little padding; an item longer than the budget gets a
    group of its own. Depends on the arguments alone, so a replayed step is cut the same way.
    """
    groups: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and (len(groups[-1]) + 1) * longest <= max_tokens:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


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
    lengths = batch.attention_mask.sum(dim=1).tolist()
    for group in by_token_budget([lengths[row] for row in chosen], max_tokens):
        index = torch.tensor([chosen[item] for item in group], device=batch.tokens.device)
        yield index, select_rows(batch, index)
