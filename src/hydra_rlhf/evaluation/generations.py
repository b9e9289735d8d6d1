"""Before and after: actor and reference answer the same held-out prompts, both sampled, from one set of weights."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hydra_rlhf.config import PPOConfig
from hydra_rlhf.data.formats import ChatFormat, TokenizedPrompt
from hydra_rlhf.evaluation.length_control import length_controlled_win_rate
from hydra_rlhf.evaluation.statistics import pair_outcomes, win_rate, win_rate_interval
from hydra_rlhf.evaluation.texts import distinct_n
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.records import Rollout
from hydra_rlhf.stages.held_out import GoldFunction, sample_and_score
from hydra_rlhf.stages.limits import StageLimits
from hydra_rlhf.stages.rollout import sequence_kl
from hydra_rlhf.stages.scoring.reward_sources import Scoring

NO_SCORES = {"score_mean": None, "reference_score_mean": None, "score_win_rate": None}
"""Of a run in which nothing scores."""
SHARED = ("prompt_index", "prompt", "kl", "sources")
"""What is kept of a pair once: the prompt's, and numbers of the actor's response alone."""


def respond_with_both(
    model: HydraModel,
    chat: ChatFormat,
    prompts: Sequence[TokenizedPrompt],
    config: PPOConfig,
    *,
    seed: int,
    reward_fn: Scoring | None,
    limits: StageLimits,
    after_token: Callable[[], None] = lambda: None,
) -> tuple[Rollout, Rollout]:
    """(actor's, reference's) responses: one sample per prompt at the training temperature, a random stream each."""
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
    return actor, reference


def compare_with_reference(
    actor: Rollout,
    reference: Rollout,
    *,
    gold: GoldFunction | None,
    num_samples: int,
    seed: int,
    record: Callable[[Rollout, int], dict[str, Any]],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(summary numbers, samples): win rates of the actor with intervals, scores, gold where there is one, KL, lengths,
    variety. Ties count half. The numbers of the score are those of the prompts whose two responses could be scored, and
    None where nothing scores. `record` is how one response is kept."""
    kl = sequence_kl(actor)
    scored = score_numbers(actor, reference, seed=seed) if actor.is_scored else NO_SCORES
    summary: dict[str, Any] = {
        "num_prompts": len(actor.responses),
        "kl": kl.mean().item(),
        "response_tokens_mean": actor.batch.response_mask.sum(dim=1).float().mean().item(),
        "reference_response_tokens_mean": reference.batch.response_mask.sum(dim=1).float().mean().item(),
        "eos_frac": actor.ended.float().mean().item(),
        **scored,
        **distinct_numbers(actor, reference),
    }
    golds: dict[str, list[float]] = {}
    if gold is not None:
        golds = {
            name: [gold(prompt, text) for prompt, text in zip(rollout.prompts.texts, rollout.responses, strict=True)]
            for name, rollout in (("actor", actor), ("reference", reference))
        }
        judged = [True] * len(actor.responses)
        summary |= {
            "gold_mean": sum(golds["actor"]) / len(actor.responses),
            "reference_gold_mean": sum(golds["reference"]) / len(actor.responses),
            **win_rate_numbers("gold", golds["actor"], golds["reference"], actor, reference, judged, seed=seed),
        }
    samples = [
        record(actor, i)
        | {f"reference_{key}": value for key, value in record(reference, i).items() if key not in SHARED}
        | ({"gold": golds["actor"][i], "reference_gold": golds["reference"][i]} if golds else {})
        for i in range(min(num_samples, len(actor.responses)))
    ]
    return summary, samples


def score_numbers(actor: Rollout, reference: Rollout, *, seed: int) -> dict[str, Any]:
    """Means and win rates of the score that training uses."""
    both = actor.valid & reference.valid
    ours, theirs = actor.scores.tolist(), reference.scores.tolist()
    return {
        "score_mean": actor.scores[both].mean().item(),
        "reference_score_mean": reference.scores[both].mean().item(),
        **win_rate_numbers("score", ours, theirs, actor, reference, both.tolist(), seed=seed),
    }


def win_rate_numbers(
    name: str,
    ours: list[float],
    theirs: list[float],
    actor: Rollout,
    reference: Rollout,
    judged: list[bool],
    *,
    seed: int,
) -> dict[str, Any]:
    """`<name>_win_rate` (ties half), `<name>_win_rate_ci` [low, high] at 95 %, and the length-controlled rate, of the
    prompts where both sides have been `judged`."""
    rows = [row for row, known in enumerate(judged) if known]
    ours, theirs = [ours[row] for row in rows], [theirs[row] for row in rows]
    outcomes = pair_outcomes(ours, theirs)
    lengths, others = (np.array([len(r.responses[row]) for row in rows], dtype=float) for r in (actor, reference))
    prompts = np.arange(len(outcomes))
    rate, interval = length_controlled_win_rate(np.array(outcomes), lengths, others, prompts, seed=seed)
    return {
        f"{name}_win_rate": win_rate(ours, theirs),
        f"{name}_win_rate_ci": list(win_rate_interval(outcomes)),
        f"{name}_length_controlled_win_rate": rate,
        f"{name}_length_controlled_win_rate_ci": list(interval),
    }


def distinct_numbers(actor: Rollout, reference: Rollout) -> dict[str, Any]:
    """Share of different words and word pairs in all responses of each side."""
    sides = (("", actor), ("reference_", reference))
    return {f"{side}distinct_{n}": distinct_n(rollout.responses, n) for side, rollout in sides for n in (1, 2)}
