"""A look at held-out prompts during stage 2: how the actor's responses score and how far it is from the reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra_rlhf.config import PPOConfig
from hydra_rlhf.data.formats import ChatFormat, TokenizedPrompt
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.records import Rollout
from hydra_rlhf.stages.limits import StageLimits
from hydra_rlhf.stages.rollout import (
    collect_rollout,
    prompt_batch,
    sample_responses,
    summarise,
)
from hydra_rlhf.stages.sample_records import role_numbers, sample_record
from hydra_rlhf.stages.scoring.reward_sources import Scoring, SourceMoments, with_moments

GoldFunction = Callable[[str, str], float]
"""(prompt, response) -> the world's gold score. For reports only: training never sees it."""

NUM_LOGGED = 4
"""Held-out responses written to samples.jsonl at each look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Prompts that stage 2 does not train on, and what their responses are judged by."""

    prompts: Sequence[TokenizedPrompt]
    reward_fn: Scoring | None = None
    gold: GoldFunction | None = None

    def look(
        self,
        model: HydraModel,
        chat: ChatFormat,
        config: PPOConfig,
        *,
        seed: int,
        limits: StageLimits | None = None,
        moments: SourceMoments | None = None,
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics `eval/*` and a few responses. Every look uses the same random stream, so looks can be compared;
        `moments` are the unit of normalised sources, the same at every look. Without a score where nothing scores."""
        rows = range(min(config.num_eval_prompts, len(self.prompts)))
        rollout = sample_and_score(
            model,
            chat,
            "actor",
            [self.prompts[row] for row in rows],
            config,
            stream=(seed, "held_out"),
            reward_fn=with_moments(self.reward_fn, moments or {}),
            limits=limits,
        )
        seen = summarise(rollout)
        metrics = {"eval/score": seen["score/mean"]} if rollout.is_scored else {}
        metrics |= {
            "eval/kl": seen["kl/reference"],
            "eval/response_tokens": seen["response/tokens_mean"],
            "eval/eos_frac": seen["response/eos_frac"],
        }
        pairs = list(zip(rollout.prompts.texts, rollout.responses, strict=True))
        golds = [self.gold(prompt, response) for prompt, response in pairs] if self.gold is not None else None
        if golds is not None:
            metrics["eval/gold"] = sum(golds) / len(golds)
        stop_ids, numbers = model.stop_ids(config.sampling.stop_token_ids), role_numbers(rollout, model.table)
        samples = [
            sample_record(chat, stop_ids, rollout, i, numbers) | ({"gold": golds[i]} if golds is not None else {})
            for i in range(min(NUM_LOGGED, len(pairs)))
        ]
        return metrics, samples


def score_of(rollout: Rollout, row: int) -> float | None:
    """The score of one response; None where nothing scores."""
    return rollout.scores[row].item() if rollout.is_scored else None


def sample_and_score(
    model: HydraModel,
    chat: ChatFormat,
    role: str,
    prompts: Sequence[TokenizedPrompt],
    config: PPOConfig,
    *,
    stream: tuple[int | str, ...],
    reward_fn: Scoring | None,
    limits: StageLimits | None = None,
    after_token: Callable[[], None] = lambda: None,
) -> Rollout:
    """One response of `role` to every prompt, looked at by every role, within the limits of training."""
    limits = limits or StageLimits.of(config)
    batch = prompt_batch(prompts, range(len(prompts)), 1, model.pad_id, model.device)
    responses = sample_responses(
        model, chat, role, batch, config.sampling, stream=stream, limits=limits, after_token=after_token
    )
    return collect_rollout(
        model,
        batch,
        responses,
        config.reward,
        temperature=config.sampling.temperature,
        limits=limits,
        reward_fn=reward_fn,
    )
