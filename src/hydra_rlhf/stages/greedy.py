"""The greedy response to each prompt of a step and its score: what ReMax compares the sampled ones with.

Nothing is learned from greedy responses: once they are scored, one number per prompt is all that is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from hydra_rlhf.algorithms.rewards import shape_scores
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.config_checks import compares_with_greedy
from hydra_rlhf.data.formats import ChatFormat
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.records import PromptBatch, Responses, Rollout
from hydra_rlhf.stages.limits import StageLimits
from hydra_rlhf.stages.rollout import collect_rollout, sample_responses
from hydra_rlhf.stages.scoring.reward_sources import Scoring, SourceMoments, next_moments, with_moments


@dataclass(frozen=True, slots=True, kw_only=True)
class Greedy:
    """The actor's likeliest response to each different prompt of a step."""

    prompts: PromptBatch
    responses: Responses


def respond_greedily(
    model: HydraModel,
    chat: ChatFormat,
    batch: PromptBatch,
    config: PPOConfig,
    *,
    stream: tuple[int | str, ...],
    limits: StageLimits,
    after_token: Callable[[], None],
) -> Greedy | None:
    """One greedy response to each prompt of a batch; None where the advantage estimator compares with none.

    `stream` decides between tokens that are equally likely.
    """
    if not compares_with_greedy(config):
        return None
    prompts, sampling = each_once(batch), replace(config.sampling, top_k=1)
    responses = sample_responses(
        model, chat, "actor", prompts, sampling, stream=(*stream, "greedy"), limits=limits, after_token=after_token
    )
    return Greedy(prompts=prompts, responses=responses)


def each_once(batch: PromptBatch) -> PromptBatch:
    """The different prompts of a batch, in order."""
    first: dict[int, int] = {}
    for row, prompt in enumerate(batch.prompt_index.tolist()):
        first.setdefault(prompt, row)
    rows = list(first.values())
    return PromptBatch(
        tokens=batch.tokens[rows],
        attention_mask=batch.attention_mask[rows],
        prompt_index=batch.prompt_index[rows],
        sample_index=batch.sample_index[rows],
        texts=[batch.texts[row] for row in rows],
        originals=[batch.originals[row] for row in rows],
        columns={name: [values[row] for row in rows] for name, values in batch.columns.items()},
    )


def score_greedy(
    model: HydraModel,
    greedy: Greedy | None,
    rollout: Rollout,
    config: PPOConfig,
    limits: StageLimits,
    reward_fn: Scoring | None,
    moments: SourceMoments,
) -> Rollout | None:
    """Greedy responses, if there are any, as all that scores sees them; the other roles do not look.

    Normalised sources have the unit that they had for `rollout`: that of `moments`, or its own where there are none.
    """
    if greedy is None:
        return None
    unit = moments or next_moments(moments, rollout.source_scores, config.reward)
    return collect_rollout(
        model,
        greedy.prompts,
        greedy.responses,
        config.reward,
        temperature=config.sampling.temperature,
        limits=limits,
        reward_fn=with_moments(reward_fn, unit),
        roles=tuple(role for role in ("reward",) if role in model.table),
    )


def with_baselines(rollout: Rollout, greedy: Rollout | None, config: PPOConfig, *, scale: float) -> Rollout:
    """A rollout with the shaped score of each prompt's greedy response, if there are any.

    Where that one could not be scored there is nothing to compare with, and the prompt's responses are left out too.
    """
    if greedy is None:
        return rollout
    row_of = {prompt: row for row, prompt in enumerate(greedy.prompts.prompt_index.tolist())}
    rows = [row_of[prompt] for prompt in rollout.prompts.prompt_index.tolist()]
    shaped = shape_scores(
        greedy.scores,
        greedy.ended,
        clip=config.reward.clip,
        missing_eos_penalty=config.reward.missing_eos_penalty,
        scale=scale,
    )
    valid = rollout.valid & greedy.valid[rows]
    return replace(
        rollout,
        baselines=torch.where(valid, shaped[rows], 0.0),
        valid=valid,
        scores=torch.where(valid, rollout.scores, torch.nan),
        dense_rewards=torch.where(valid[:, None], rollout.dense_rewards, 0.0),
    )
