"""Scores of texts that somebody else wrote: the reward head reads them by its own tokenizer and template."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from hydra_rlhf.data.formats import ChatFormat, TokenizedDemonstration
from hydra_rlhf.data.rows import PromptValue
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.records import TokenBatch
from hydra_rlhf.stages.examples import token_micro_batches
from hydra_rlhf.stages.limits import StageLimits, map_micro_batches

LONGEST_RESPONSE = 1_000_000
"""Responses are scored whole, not cut as in the data."""


@torch.no_grad()
def score_texts(
    model: HydraModel,
    chat: ChatFormat,
    prompts: Sequence[PromptValue],
    responses: Sequence[str],
    ended: Sequence[bool],
    *,
    limits: StageLimits,
) -> list[float]:
    """The reward head's score of each response; one that did not end is scored without a stop token."""
    whole = replace(chat, max_response_tokens=LONGEST_RESPONSE)
    rows: list[TokenizedDemonstration] = []
    for prompt, response, has_ended in zip(prompts, responses, ended, strict=True):
        ids, _ = whole.encode_response(response)
        rows.append(TokenizedDemonstration(whole.encode_prompt(prompt)[0], ids if has_ended else ids[:-1] or ids))

    def look(numbers: list[int], batch: TokenBatch) -> list[tuple[int, float]]:
        scores = model.evaluate(batch, ["reward"])["reward"].scores
        assert scores is not None
        return list(zip(numbers, scores.tolist(), strict=True))

    cut = partial(token_micro_batches, rows, pad_id=model.pad_id, device=model.device)
    found = dict(pair for group in map_micro_batches(limits, cut, look) for pair in group)
    return [found[number] for number in range(len(rows))]
