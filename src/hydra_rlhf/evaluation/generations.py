"""Before and after: actor and reference answer the same held-out prompts, both sampled, from one set of weights."""

from collections.abc import Callable, Sequence
from typing import Any

from hydra_rlhf.config import PPOConfig
from hydra_rlhf.data.formats import ChatFormat, TokenizedPrompt
from hydra_rlhf.evaluation.statistics import pair_outcomes, win_rate, win_rate_interval
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.stages.held_out import GoldFunction, sample_and_score
from hydra_rlhf.stages.limits import StageLimits
from hydra_rlhf.stages.rollout import sequence_kl
from hydra_rlhf.stages.scoring.reward_sources import Scoring


def compare_with_reference(
    model: HydraModel,
    chat: ChatFormat,
    prompts: Sequence[TokenizedPrompt],
    config: PPOConfig,
    *,
    seed: int,
    reward_fn: Scoring | None,
    gold: GoldFunction | None,
    num_samples: int,
    limits: StageLimits,
    after_token: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(summary numbers, samples): win rates of the actor with intervals, scores, gold where there is one, KL, lengths.

    Each side draws from its own random stream, one sample per prompt at the training temperature; ties count half. The
    numbers of the score are those of the prompts whose two responses could both be scored.
    """
    actor, reference = (
        sample_and_score(
            model,
            chat,
            role,
            prompts,
            config,
            stream=(seed, "evaluation", role),
            reward_fn=reward_fn,
            limits=limits,
            after_token=after_token,
        )
        for role in ("actor", "reference")
    )
    kl = sequence_kl(actor)
    scores = {"actor": actor.scores.tolist(), "reference": reference.scores.tolist()}
    both = actor.valid & reference.valid
    summary: dict[str, Any] = {
        "num_prompts": len(prompts),
        "kl": kl.mean().item(),
        "score_mean": actor.scores[both].mean().item(),
        "reference_score_mean": reference.scores[both].mean().item(),
        "response_tokens_mean": actor.batch.response_mask.sum(dim=1).float().mean().item(),
        "reference_response_tokens_mean": reference.batch.response_mask.sum(dim=1).float().mean().item(),
        "eos_frac": actor.ended.float().mean().item(),
        **win_rate_numbers("score", actor.scores[both].tolist(), reference.scores[both].tolist()),
    }
    golds: dict[str, list[float]] = {}
    if gold is not None:
        golds = {
            name: [gold(prompt, text) for prompt, text in zip(rollout.prompts.texts, rollout.responses, strict=True)]
            for name, rollout in (("actor", actor), ("reference", reference))
        }
        summary |= {
            "gold_mean": sum(golds["actor"]) / len(prompts),
            "reference_gold_mean": sum(golds["reference"]) / len(prompts),
            **win_rate_numbers("gold", golds["actor"], golds["reference"]),
        }
    samples = [
        {
            "prompt_index": i,
            "prompt": actor.prompts.texts[i],
            "response": actor.responses[i],
            "score": scores["actor"][i],
            "kl": kl[i].item(),
            "reference_response": reference.responses[i],
            "reference_score": scores["reference"][i],
            **({"gold": golds["actor"][i], "reference_gold": golds["reference"][i]} if golds else {}),
        }
        for i in range(min(num_samples, len(prompts)))
    ]
    return summary, samples


def win_rate_numbers(name: str, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """`<name>_win_rate` (ties half) and `<name>_win_rate_ci` [low, high] at 95 %."""
    return {
        f"{name}_win_rate": win_rate(ours, theirs),
        f"{name}_win_rate_ci": list(win_rate_interval(pair_outcomes(ours, theirs))),
    }
