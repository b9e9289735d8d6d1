"""How well LoRA-off roles fit held-out pairs: perplexity (LM head), accuracy and calibration (reward head)."""

import math
from collections.abc import Sequence
from functools import partial

import torch

from hydra_rlhf.data.formats import TokenizedPair
from hydra_rlhf.evaluation.statistics import calibration_error, pair_accuracy
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.records import TokenBatch
from hydra_rlhf.stages.examples import count, lm_mask, token_micro_batches
from hydra_rlhf.stages.limits import StageLimits, map_micro_batches


@torch.no_grad()
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

    def look(_: list[int], batch: TokenBatch) -> tuple[float, list[float]]:
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
        return logprob, margins

    cut = partial(token_micro_batches, pairs, pad_id=model.pad_id, device=model.device)
    seen = map_micro_batches(limits, cut, look)
    total_logprob = sum(logprob for logprob, _ in seen)
    margins = [margin for _, group in seen for margin in group]
    metrics: dict[str, float] = {}
    if "reference" in roles:
        metrics["eval/perplexity"] = math.exp(min(-total_logprob / count(pairs).num_lm_tokens, 700.0))
    if "reward" in roles:
        metrics["eval/pair_accuracy"] = pair_accuracy(margins)
        metrics["eval/margin"] = math.fsum(margins) / len(margins)
        metrics["eval/calibration_error"] = calibration_error(margins)
    return metrics


@torch.no_grad()
def mean_chosen_score(model: HydraModel, pairs: Sequence[TokenizedPair], *, limits: StageLimits) -> float:
    """Mean score of the chosen responses: what the reward head is shifted by, so that they average zero."""

    def look(_: list[int], batch: TokenBatch) -> float:
        scores = model.evaluate(batch, ["reward"])["reward"].scores
        assert scores is not None
        return scores.chunk(2)[0].double().sum().item()

    cut = partial(token_micro_batches, pairs, pad_id=model.pad_id, device=model.device)
    return sum(map_micro_batches(limits, cut, look)) / len(pairs)
