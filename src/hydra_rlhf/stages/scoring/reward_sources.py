"""Scores from everything besides the reward head: asked together, scaled, weighed, and what a failure does."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hydra_rlhf.algorithms.rewards import Moments, update_moments
from hydra_rlhf.config import RewardConfig
from hydra_rlhf.config_rewards import SourceConfig
from hydra_rlhf.errors import ConfigError, RewardFunctionError
from hydra_rlhf.records import PromptBatch, Responses
from hydra_rlhf.stages.reward_fn import RewardFunction, call_reward_fn
from hydra_rlhf.stages.scoring.outcomes import Failure, Outcome, ScoreCall, ScoreRequest, failures, score_in_parts

SourceMoments: TypeAlias = Mapping[str, Moments]
"""Running moments of the normalised sources, by name."""

log = logging.getLogger(__name__)

MEAN, STD, FAILED = "reward/NAME_mean", "reward/NAME_std", "reward/NAME_failed"
"""What is logged of each source; NAME is its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSource:
    """A source that can be asked."""

    config: SourceConfig
    call: ScoreCall
    batch_rows: int | None = None
    """Responses per call; None = all at once."""
    prepare: Callable[[], object] = lambda: None
    """Loads what takes memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedScores:
    """Scores of a batch from several sources."""

    scores: Float[Tensor, " b"]
    """Their weighted sum; NaN where not `valid`."""
    dense_rewards: Float[Tensor, "b r"]
    """The per-token part of it; 0 where not `valid`."""
    valid: Bool[Tensor, " b"]
    """False where a source failed whose failures are masked."""
    source_scores: dict[str, Tensor]
    """Each source's own scores, {name: [b]}; NaN where it failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSources:
    """The open sources of a run, in the order in which their scores are added. A value: nothing in it changes."""

    sources: tuple[OpenSource, ...]
    moments: SourceMoments = field(default_factory=dict)
    """What normalised sources are divided by the deviation of; one that has none yet, by that of the batch itself."""

    def prepare(self) -> None:
        """Load what takes memory; asked for before the memory plan counts what is free."""
        for source in self.sources:
            source.prepare()

    def add_to(
        self, scores: Float[Tensor, " b"], prompts: PromptBatch, responses: Responses, *, max_failed_frac: float
    ) -> AddedScores:
        """`scores` (of the reward head, weighed) plus those of every source.

        Raises `RewardFunctionError` for a failure that is to raise, and for too many others.
        """
        request = request_of(prompts, responses)
        mask = responses.batch.response_mask
        dense = torch.zeros(mask.shape, device=mask.device)
        valid = torch.ones_like(responses.ended)
        failed: dict[int, str] = {}
        source_scores: dict[str, Tensor] = {}
        for source in self.sources:
            config = source.config
            max_failed = 0 if config.on_failure == "raise" else math.floor(max_failed_frac * len(mask))
            outcomes = score_in_parts(source.call, request, source.batch_rows, max_failed=max_failed)
            failed |= {row: f"{config.name} {reason}" for row, reason in failures(outcomes)}
            refuse_failures(config, outcomes, failed, max_failed_frac=max_failed_frac)
            tell_failures(config, outcomes)
            own, own_dense = as_tensors(outcomes, mask)
            source_scores[config.name] = own
            if config.on_failure == "mask":
                valid &= own.isfinite()
            filled = torch.where(own.isfinite(), own, config.failure_value)
            scale = self.scale_of(config, own)
            scores = scores + config.weight * (filled / scale)
            dense = dense + config.weight * (own_dense / scale)
        if not valid.any():
            raise RewardFunctionError(f"no response could be scored: row 0: {failed[0]}")
        return AddedScores(
            scores=torch.where(valid, scores, math.nan),
            dense_rewards=torch.where(valid[:, None], dense, 0.0),
            valid=valid,
            source_scores=source_scores,
        )

    def scale_of(self, config: SourceConfig, own: Float[Tensor, " b"]) -> float:
        """What a source's scores are divided by."""
        if not config.normalize:
            return 1.0
        seen = self.moments.get(config.name, Moments())
        return (seen if seen.count else update_moments(seen, own)).scale


Scoring: TypeAlias = RewardFunction | RewardSources
"""What a rollout is scored by besides the reward head: one function, or the open sources of a recipe."""


def as_sources(reward_fn: Scoring | None, reward: RewardConfig) -> RewardSources:
    """A single function, or none, as sources. Raises `ConfigError` where the settings list some that are not open."""
    if isinstance(reward_fn, RewardSources):
        return reward_fn
    if reward.sources:
        raise ConfigError(
            f"ppo.reward.sources lists {reward.sources[0].name!r}, but they are not open; open them with open_sources"
        )
    return RewardSources(sources=() if reward_fn is None else (function_source(reward_fn, reward),))


def function_source(reward_fn: RewardFunction, reward: RewardConfig) -> OpenSource:
    """`ppo.reward.reward_fn`, or a function given in Python, as the source that it is."""
    return OpenSource(
        config=SourceConfig(name="reward_fn", weight=reward.reward_fn_coef),
        call=lambda request: call_reward_fn(reward_fn, request),
    )


def with_moments(reward_fn: Scoring | None, moments: SourceMoments) -> Scoring | None:
    """The same sources, the normalised ones in the unit of `moments`; a single function has no such unit."""
    return replace(reward_fn, moments=moments) if isinstance(reward_fn, RewardSources) else reward_fn


def next_moments(
    moments: SourceMoments, source_scores: Mapping[str, Tensor], reward: RewardConfig
) -> dict[str, Moments]:
    """The running moments after a rollout too, of the sources that are normalised. Failures are left out."""
    names = [source.name for source in reward.sources if source.normalize]
    return {name: update_moments(moments.get(name, Moments()), source_scores[name]) for name in names}


def source_metrics(source_scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean and spread of each source's own scores where it gave one, and how often it failed."""
    metrics: dict[str, float] = {}
    for name, scores in source_scores.items():
        given = scores[~scores.isnan()]
        metrics[MEAN.replace("NAME", name)] = given.mean().item()
        metrics[STD.replace("NAME", name)] = given.std(correction=0).item() if len(given) else math.nan
        metrics[FAILED.replace("NAME", name)] = float(len(scores) - len(given))
    return metrics


def request_of(prompts: PromptBatch, responses: Responses) -> ScoreRequest:
    """A batch of responses as plain data."""
    mask, tokens = responses.batch.response_mask, responses.batch.tokens[:, responses.batch.num_prompt_columns :]
    return ScoreRequest(
        prompts=prompts.texts,
        originals=prompts.originals,
        responses=responses.texts,
        response_ids=[row[keep].tolist() for row, keep in zip(tokens.cpu(), mask.cpu(), strict=True)],
        columns=prompts.columns,
    )


def refuse_failures(
    config: SourceConfig, outcomes: Sequence[Outcome], failed: Mapping[int, str], *, max_failed_frac: float
) -> None:
    """Raise `RewardFunctionError` where a failure of this source is to raise, or where more responses have failed, with
    this source or before it, than a step may leave out."""
    own = next(failures(outcomes), None)
    if own is None:
        return
    row, reason = own
    if config.on_failure == "raise":
        raise RewardFunctionError(
            f"row {row}: {config.name} {reason}; mend it, or list it in ppo.reward.sources with on_failure: mask"
        )
    if len(failed) > max_failed_frac * len(outcomes):
        raise RewardFunctionError(
            f"{len(failed)} of {len(outcomes)} responses could not be scored, more than "
            f"ppo.reward.max_failed_frac={max_failed_frac:g} allows; row {row}: {config.name} {reason}"
        )


def tell_failures(config: SourceConfig, outcomes: Sequence[Outcome]) -> None:
    """Warn of the failures that a step goes on without."""
    found = list(failures(outcomes))
    if found:
        row, reason = found[0]
        what = "left out" if config.on_failure == "mask" else f"given {config.failure_value:g}"
        log.warning(
            "%d of %d responses are %s: row %d: %s %s", len(found), len(outcomes), what, row, config.name, reason
        )


def as_tensors(
    outcomes: Sequence[Outcome], mask: Bool[Tensor, "b r"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b r"]]:
    """Scores [b], NaN for failures, and per-token rewards [b, r], 0 where there are none."""
    scores, dense = torch.zeros(len(outcomes)), torch.zeros(mask.shape)
    for row, outcome in enumerate(outcomes):
        if isinstance(outcome, list):
            dense[row, : len(outcome)] = torch.tensor(outcome)
            scores[row] = sum(outcome)
        else:
            scores[row] = math.nan if isinstance(outcome, Failure) else outcome
    return scores.to(mask.device), dense.to(mask.device)
