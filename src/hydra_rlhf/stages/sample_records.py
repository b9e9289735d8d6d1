"""What is kept of a sampled response: its text cut at its tokens, and what every role and the learning said of each.

A field that a method has no role for is not there: without a critic no `value`, without a reference no `kl`. The
report's page colours tokens by these fields; docs/metrics.md says what each one is.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hydra_rlhf.config import PPOConfig
from hydra_rlhf.data.formats import ChatFormat
from hydra_rlhf.data.pieces import BROKEN, text_pieces
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.roles import RoleTable
from hydra_rlhf.records import PPOTargets, Rollout, TokenBatch
from hydra_rlhf.stages.limits import StageLimits
from hydra_rlhf.stages.rollout import score_roles, sequence_kl

DIGITS = 4
"""Significant digits that are written of a number of one token."""

TokenNumbers = Mapping[str, Float[Tensor, "b r"]]
"""Numbers of response tokens by name, for the first rows of a rollout."""


def rollout_samples(
    model: HydraModel,
    chat: ChatFormat,
    rollout: Rollout,
    targets: PPOTargets,
    config: PPOConfig,
    *,
    limits: StageLimits,
) -> list[dict[str, Any]]:
    """The first `num_logged_samples` rows of a rollout that has been learned from.

    The actor looks at these few rows once more: `change` is what the update did to the log-prob of each token.
    """
    count = min(config.num_logged_samples, len(rollout.responses))
    if count == 0:
        return []
    kept = first_rows(rollout.batch, count)
    after = score_roles(model, kept, ("actor",), temperature=config.sampling.temperature, limits=limits).logprobs
    numbers = {
        **role_numbers(rollout, model.table),
        "advantage": targets.advantages,
        "reward": targets.rewards,
        "change": after - rollout.logprobs[:count],
    }
    stop_ids = model.stop_ids(config.sampling.stop_token_ids)
    return [sample_record(chat, stop_ids, rollout, row, numbers) for row in range(count)]


def first_rows(batch: TokenBatch, count: int) -> TokenBatch:
    """The first rows of a batch, as wide as it is."""
    return TokenBatch(
        tokens=batch.tokens[:count],
        attention_mask=batch.attention_mask[:count],
        response_mask=batch.response_mask[:count],
    )


def role_numbers(rollout: Rollout, table: RoleTable) -> TokenNumbers:
    """What the roles of a method say of each token: the actor's log-prob, its lead over the reference's, the value."""
    numbers = {"logprob": rollout.logprobs}
    if "reference" in table:
        numbers["kl"] = rollout.logprobs - rollout.ref_logprobs
    if "critic" in table:
        numbers["value"] = rollout.values
    return numbers


def sample_record(
    chat: ChatFormat, stop_ids: tuple[int, ...], rollout: Rollout, row: int, numbers: TokenNumbers
) -> dict[str, Any]:
    """One response as samples.jsonl has it: text, score, KL (nats), and its tokens."""
    return {
        "prompt_index": int(rollout.prompts.prompt_index[row]),
        "prompt": rollout.prompts.texts[row],
        "response": rollout.responses[row],
        "ended": bool(rollout.ended[row]),
        "score": rollout.scores[row].item() if rollout.is_scored else None,
        "kl": sequence_kl(rollout)[row].item(),
        "tokens": token_record(chat, stop_ids, rollout, row, numbers),
        **({"sources": source_scores(rollout, row)} if len(rollout.source_scores) > 1 else {}),
    }


def source_scores(rollout: Rollout, row: int) -> dict[str, float]:
    """What each source says of one response."""
    return {name: scores[row].item() for name, scores in rollout.source_scores.items()}


def token_record(
    chat: ChatFormat, stop_ids: tuple[int, ...], rollout: Rollout, row: int, numbers: TokenNumbers
) -> dict[str, Any]:
    """The counted tokens of one response: ids, pieces that join to its text, and each number of each token.

    `names` are those of tokens that cannot be read off their piece, by position: special ones, parts of a character.
    """
    mask = rollout.batch.response_mask[row]
    ids: list[int] = rollout.batch.tokens[row, rollout.batch.num_prompt_columns :][mask].tolist()
    pieces = text_pieces(ids, rollout.responses[row], lambda begun: chat.decode_response(begun, stop_ids))
    unreadable = [place for place, piece in enumerate(pieces) if not piece or BROKEN in piece]
    names = chat.tokenizer.convert_ids_to_tokens([ids[place] for place in unreadable])
    return {
        "ids": ids,
        "pieces": pieces,
        **({"names": dict(zip(map(str, unreadable), names, strict=True))} if unreadable else {}),
        **{name: short(values[row][mask]) for name, values in numbers.items()},
    }


def short(values: Float[Tensor, " t"]) -> list[float]:
    """Numbers with few digits; zero has no sign."""
    return [float(f"{value:.{DIGITS}g}") + 0.0 for value in values.to(torch.float64).tolist()]
