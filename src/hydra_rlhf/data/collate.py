"""Token ids -> padded batches: prompts padded on the left, responses on the right, masks carried beside them.

Masked columns hold `pad_id`, which may be any id of the model's vocabulary: nothing reads it. The default 0 always is
one; a tokenizer's pad token need not exist, nor lie inside the model's embedding.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hydra_rlhf.data.formats import TokenizedDemonstration, TokenizedPair, TokenizedPrompt
from hydra_rlhf.records import PromptBatch, TokenBatch

Ids = Sequence[int]


def left_pad_prompts(
    prompts: Sequence[TokenizedPrompt], prompt_index: Sequence[int], pad_id: int = 0, *, samples_per_prompt: int = 1
) -> PromptBatch:
    """Prompts as one batch, each `samples_per_prompt` times in a row; `prompt_index` is each one's row in its dataset.

    A column that only some prompts have is None for the others.
    """
    assert len(prompts) == len(prompt_index), f"{len(prompts)} prompts with {len(prompt_index)} indices"
    repeated = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    tokens, attention_mask = _pad([prompt.prompt_ids for prompt in repeated], pad_id, left=True)
    names = sorted({name for prompt in prompts for name in prompt.columns})
    return PromptBatch(
        tokens=tokens,
        attention_mask=attention_mask,
        prompt_index=torch.tensor([index for index in prompt_index for _ in range(samples_per_prompt)]),
        sample_index=torch.arange(samples_per_prompt).repeat(len(prompts)),
        texts=[prompt.text for prompt in repeated],
        originals=[prompt.text if prompt.original is None else prompt.original for prompt in repeated],
        columns={name: [prompt.columns.get(name) for prompt in repeated] for name in names},
    )


def collate_responses(prompts: Sequence[Ids], responses: Sequence[Ids], pad_id: int = 0) -> TokenBatch:
    """One row for each prompt and its response: tokens [b, p + r], p and r the longest prompt and response."""
    assert len(prompts) == len(responses), f"{len(prompts)} prompts with {len(responses)} responses"
    prompt_tokens, prompt_mask = _pad(prompts, pad_id, left=True)
    response_tokens, response_mask = _pad(responses, pad_id, left=False)
    return TokenBatch(
        tokens=torch.cat([prompt_tokens, response_tokens], dim=1),
        attention_mask=torch.cat([prompt_mask, response_mask], dim=1),
        response_mask=response_mask,
    )


def collate_pairs(pairs: Sequence[TokenizedPair], pad_id: int = 0) -> TokenBatch:
    """b pairs as 2b rows, for one forward: the b chosen rows, then the b rejected rows, all with the same columns."""
    prompts = [pair.prompt_ids for pair in pairs]
    responses = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    return collate_responses(prompts + prompts, responses, pad_id)


def collate_demonstrations(rows: Sequence[TokenizedDemonstration], pad_id: int = 0) -> TokenBatch:
    """b demonstrations as b rows."""
    return collate_responses([row.prompt_ids for row in rows], [row.response_ids for row in rows], pad_id)


def _pad(rows: Sequence[Ids], pad_id: int, *, left: bool) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """(tokens, mask): the rows in a block as wide as the longest, pushed to the right where `left` is padded."""
    assert rows, "a batch needs at least one row"
    assert all(len(row) > 0 for row in rows), "every prompt and every response needs at least one token"
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[index, columns] = torch.tensor(row, dtype=torch.long)
        mask[index, columns] = True
    return tokens, mask
