"""How well LoRA-off roles fit held-out pairs: perplexity (LM head), accuracy and calibration (reward head)."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from hydra_rlhf.data.formats import TokenizedPair
from hydra_rlhf.evaluation.statistics import (
    calibration_error,
    calibration_interval,
    pair_accuracy,
    pair_outcomes,
    reliability_bins,
    win_rate_interval,
)
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.records import TokenBatch
from hydra_rlhf.stages.examples import count, lm_mask, token_micro_batches
from hydra_rlhf.stages.limits import StageLimits, map_micro_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFit:
    """How LoRA-off roles read held-out pairs; None where there is no such role."""

    perplexity: float | None
    """Of the chosen responses, under the reference."""
    margins: list[float] | None
    """Score of chosen minus score of rejected of each pair, by the reward head."""


@torch.no_grad()
def read_pairs(
    model: HydraModel,
    pairs: Sequence[TokenizedPair],
    roles: Sequence[str],
    *,
    limits: StageLimits,
    adapter: str | None = None,
) -> PairFit:
    """Let `reference` and `reward`, as far as they are among the roles, look at every pair once.

    `adapter` is a LoRA set still to be merged.
    """

    def look(members: list[int], batch: TokenBatch) -> tuple[float, list[tuple[int, float]]]:
        outputs = model.evaluate(batch, roles, lm_mask=lm_mask(batch, pairs), adapter_when_off=adapter)
        logprob, margins = 0.0, list[float]()
        if "reference" in outputs:
            logprobs = outputs["reference"].logprobs
            assert logprobs is not None
            logprob = logprobs.double().sum().item()
        if "reward" in outputs:
            scores = outputs["reward"].scores
            assert scores is not None
            chosen, rejected = scores.chunk(2)
            margins = (chosen - rejected).tolist()
        return logprob, list(zip(members, margins, strict=False))

    cut = partial(token_micro_batches, pairs, pad_id=model.pad_id, device=model.device)
    seen = map_micro_batches(limits, cut, look)
    margin_of = {member: margin for _, group in seen for member, margin in group}
    mean_loss = -sum(logprob for logprob, _ in seen) / count(pairs).num_lm_tokens
    return PairFit(
        perplexity=math.exp(min(mean_loss, 700.0)) if "reference" in roles else None,
        margins=[margin_of[i] for i in range(len(pairs))] if "reward" in roles else None,
    )


def evaluate_preferences(
    model: HydraModel,
    pairs: Sequence[TokenizedPair],
    roles: Sequence[str],
    *,
    limits: StageLimits,
    adapter: str | None = None,
) -> dict[str, float]:
    """`eval/perplexity` of chosen responses (with a `reference` role), and `eval/pair_accuracy`, `eval/margin` and
    `eval/calibration_error` of the scores (with a `reward` role). `adapter` is a LoRA set still to be merged."""
    fit = read_pairs(model, pairs, roles, limits=limits, adapter=adapter)
    metrics: dict[str, float] = {}
    if fit.perplexity is not None:
        metrics["eval/perplexity"] = fit.perplexity
    if fit.margins is not None:
        metrics["eval/pair_accuracy"] = pair_accuracy(fit.margins)
        metrics["eval/margin"] = math.fsum(fit.margins) / len(fit.margins)
        metrics["eval/calibration_error"] = calibration_error(fit.margins)
    return metrics


def reward_numbers(margins: Sequence[float], *, seed: int) -> dict[str, Any]:
    """Accuracy and calibration of the reward head with 95 % intervals, and the points of its reliability diagram."""
    return {
        "reward_accuracy": pair_accuracy(margins),
        "reward_accuracy_ci": list(win_rate_interval(pair_outcomes(margins, [0.0] * len(margins)))),
        "calibration_error": calibration_error(margins),
        "calibration_error_ci": list(calibration_interval(margins, seed=seed)),
        "reliability": [asdict(points) for points in reliability_bins(margins)] if all_numbers(margins) else None,
    }


def all_numbers(values: Sequence[float]) -> bool:
    """Whether none is NaN."""
    return not any(math.isnan(value) for value in values)


@torch.no_grad()
def mean_chosen_score(model: HydraModel, pairs: Sequence[TokenizedPair], *, limits: StageLimits) -> float:
    """Mean score of the chosen responses: what the reward head is shifted by, so that they average zero."""

    def look(_: list[int], batch: TokenBatch) -> float:
        scores = model.evaluate(batch, ["reward"])["reward"].scores
        assert scores is not None
        return scores.chunk(2)[0].double().sum().item()

    cut = partial(token_micro_batches, pairs, pad_id=model.pad_id, device=model.device)
    return sum(map_micro_batches(limits, cut, look)) / len(pairs)
