"""How well LoRA-off roles fit held-out pairs: perplexity (LM head), accuracy and calibration (reward head)."""

import math
from collections.abc import Sequence

import torch

from hydra_rlhf.data.formats import TokenizedPair
from hydra_rlhf.evaluation.statistics import calibration_error, pair_accuracy
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.stages.examples import count, lm_mask, token_micro_batches


@torch.no_grad()
def evaluate_preferences(
    model: HydraModel,
    pairs: Sequence[TokenizedPair],
    roles: Sequence[str],
    *,
    micro_batch_tokens: int,
    adapter: str | None = None,
) -> dict[str, float]:
    """`eval/perplexity` of chosen responses (with a `reference` role), and `eval/pair_accuracy`, `eval/margin` and
    `eval/calibration_error` of the scores (with a `reward` role). `adapter` is a LoRA set still to be merged."""
    total_logprob, margins = 0.0, list[float]()
    for batch in token_micro_batches(pairs, micro_batch_tokens, model.pad_id, model.device):
        outputs = model.evaluate(batch, roles, lm_mask=lm_mask(batch, pairs), adapter_when_off=adapter)
        if "reference" in outputs:
            logprobs = outputs["reference"].logprobs
            assert logprobs is not None
            total_logprob += logprobs.double().sum().item()
        if "reward" in outputs:
            scores = outputs["reward"].scores
            assert scores is not None
            chosen, rejected = scores.chunk(2)
            margins += (chosen - rejected).tolist()
    metrics: dict[str, float] = {}
    if "reference" in roles:
        metrics["eval/perplexity"] = math.exp(min(-total_logprob / count(pairs).num_lm_tokens, 700.0))
    if "reward" in roles:
        metrics["eval/pair_accuracy"] = pair_accuracy(margins)
        metrics["eval/margin"] = math.fsum(margins) / len(margins)
        metrics["eval/calibration_error"] = calibration_error(margins)
    return metrics


@torch.no_grad()
def mean_chosen_score(model: HydraModel, pairs: Sequence[TokenizedPair], *, micro_batch_tokens: int) -> float:
    """Mean score of the chosen responses: what the reward head is shifted by, so that they average zero."""
    total = 0.0
    for batch in token_micro_batches(pairs, micro_batch_tokens, model.pad_id, model.device):
        scores = model.evaluate(batch, ["reward"])["reward"].scores
        assert scores is not None
        total += scores.chunk(2)[0].double().sum().item()
    return total / len(pairs)
