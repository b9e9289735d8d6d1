"""Training examples of stage 1: which rows a step uses, their counts, and how they become padded micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from hydra_rlhf.data.collate import collate_demonstrations, collate_pairs
from hydra_rlhf.data.formats import TokenizedDemonstration, TokenizedPair
from hydra_rlhf.model.device import call_tokens
from hydra_rlhf.records import TokenBatch
from hydra_rlhf.runtime.randomness import permutation
from hydra_rlhf.stages.micro_batches import Size, by_token_budget

Example = TokenizedPair | TokenizedDemonstration


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCounts:
    """The denominators of one optimizer step, over all its micro-batches."""

    num_examples: int
    """Pairs or demonstrations."""
    num_lm_tokens: int
    """Response tokens that cross entropy is taken over."""


def batch_rows(num_examples: int, batch_size: int, step: int, seed: int, stage: str) -> list[int]:
    """Rows of optimizer step `step` (from 0): shuffled epochs laid end to end, cut into full batches."""
    orders: dict[int, list[int]] = {}
    rows: list[int] = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, num_examples)
        if epoch not in orders:
            orders[epoch] = permutation(num_examples, seed, stage, "examples", epoch)
        rows.append(orders[epoch][place])
    return rows


def padded_sizes(examples: Sequence[Example]) -> list[Size]:
    """What each example needs in a forward: a pair is two rows of its longer side."""
    return [
        (2 * len(e.prompt_ids), 2 * max(len(e.chosen_ids), len(e.rejected_ids)))
        if isinstance(e, TokenizedPair)
        else (len(e.prompt_ids), len(e.response_ids))
        for e in examples
    ]


def num_tokens(examples: Sequence[Example]) -> int:
    """Tokens of a batch if every example were padded to its own longer side alone."""
    return sum(prompt + response for prompt, response in padded_sizes(examples))


def longest(examples: Sequence[Example]) -> tuple[int, int]:
    """Tokens of the longest prompt and of the longest response, each over all examples."""
    responses = [
        max(len(e.chosen_ids), len(e.rejected_ids)) if isinstance(e, TokenizedPair) else len(e.response_ids)
        for e in examples
    ]
    return max(len(e.prompt_ids) for e in examples), max(responses)


def count(examples: Sequence[Example]) -> BatchCounts:
    """The denominators of a batch: cross entropy is taken over chosen responses and demonstrations."""
    num_lm_tokens = sum(len(e.chosen_ids if isinstance(e, TokenizedPair) else e.response_ids) for e in examples)
    return BatchCounts(num_examples=len(examples), num_lm_tokens=num_lm_tokens)


def token_micro_batches(
    examples: Sequence[Example], max_tokens: int, *, pad_id: int, device: torch.device
) -> Iterator[tuple[list[int], TokenBatch]]:
    """Yield (positions in `examples`, those collated) within a token budget; both sides of a pair stay together."""
    for group in by_token_budget(padded_sizes(examples), max_tokens, call_tokens(device)):
        yield group, collate([examples[i] for i in group], pad_id, device)


def collate(examples: Sequence[Example], pad_id: int, device: torch.device) -> TokenBatch:
    """Pairs become 2b rows (chosen ones, then rejected ones), demonstrations b rows."""
    pairs = [example for example in examples if isinstance(example, TokenizedPair)]
    if pairs:
        batch = collate_pairs(pairs, pad_id)
    else:
        demonstrations = [e for e in examples if isinstance(e, TokenizedDemonstration)]
        batch = collate_demonstrations(demonstrations, pad_id)
    return TokenBatch(
        tokens=batch.tokens.to(device),
        attention_mask=batch.attention_mask.to(device),
        response_mask=batch.response_mask.to(device),
    )


def chosen_mask(batch: TokenBatch) -> Bool[Tensor, "b r"]:
    """The response mask of a batch of pairs with the rejected rows left out."""
    mask = batch.response_mask.clone()
    mask[len(mask) // 2 :] = False
    return mask


def lm_mask(micro_batch: TokenBatch, examples: Sequence[Example]) -> Bool[Tensor, "b r"]:
    """The response tokens that meet the LM head: those of chosen responses, or of demonstrations."""
    return chosen_mask(micro_batch) if isinstance(examples[0], TokenizedPair) else micro_batch.response_mask
