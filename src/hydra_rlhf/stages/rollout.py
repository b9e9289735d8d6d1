"""Prompts -> responses -> what every role says about them: the acting half of a PPO step."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from hydra_rlhf.config import RewardConfig, SamplingConfig
from hydra_rlhf.data.collate import left_pad_prompts
from hydra_rlhf.data.formats import ChatFormat, TokenizedPrompt
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.sample import finish
from hydra_rlhf.model.sampling import Sampling
from hydra_rlhf.model.stop_strings import StopStrings
from hydra_rlhf.records import PromptBatch, Responses, RoleOutput, Rollout, TokenBatch
from hydra_rlhf.runtime.randomness import permutation, uniforms
from hydra_rlhf.stages.limits import StageLimits, finish_rows, map_micro_batches
from hydra_rlhf.stages.micro_batches import micro_batches
from hydra_rlhf.stages.scoring.reward_sources import Scoring, as_sources, source_metrics

FIELDS_OF = {
    "actor": {"logprobs": "logprobs", "entropy": "entropy"},
    "reference": {"logprobs": "ref_logprobs"},
    "critic": {"values": "values"},
    "reward": {"scores": "scores"},
}
"""Where each role's output goes: {role: {field of RoleOutput: field of Scored}}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What roles say about a whole batch, put together from micro-batches; zero where a role was not asked."""

    logprobs: Float[Tensor, "b r"]
    entropy: Float[Tensor, "b r"]
    ref_logprobs: Float[Tensor, "b r"]
    values: Float[Tensor, "b r"]
    scores: Float[Tensor, " b"]


def prompt_rows(num_prompts: int, batch_size: int, step: int, *seed: int | str) -> list[int]:
    """Which prompts PPO step `step` (from 0) uses: shuffled epochs laid end to end, cut into batches."""
    rows: list[int] = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, num_prompts)
        if not rows or place == 0:
            order = permutation(num_prompts, *seed, "prompts", epoch)
        rows.append(order[place])  # pyright: ignore[reportPossiblyUnboundVariable]
    return rows


def prompt_batch(
    prompts: Sequence[TokenizedPrompt], rows: Sequence[int], samples_per_prompt: int, pad_id: int, device: torch.device
) -> PromptBatch:
    """Collate the prompts at `rows`, each `samples_per_prompt` times; repeats get further sample numbers."""
    repeated = [row for row in rows for _ in range(samples_per_prompt)]
    seen: Counter[int] = Counter()
    sample_index: list[int] = []
    for row in repeated:
        sample_index.append(seen[row])
        seen[row] += 1
    batch = left_pad_prompts([prompts[row] for row in repeated], repeated, pad_id)
    return replace(
        batch,
        tokens=batch.tokens.to(device),
        attention_mask=batch.attention_mask.to(device),
        sample_index=torch.tensor(sample_index),
    )


def sample_responses(
    model: HydraModel,
    chat: ChatFormat,
    role_name: str,
    prompts: PromptBatch,
    sampling: SamplingConfig,
    *,
    stream: tuple[int | str, ...],
    limits: StageLimits,
    after_token: Callable[[], None] = lambda: None,
) -> Responses:
    """Sample one response per row from a role with an LM head; `stream` names the random stream (run seed, step, ...).

    Each sequence draws from its own stream, (stream, prompt, sample), so it does not matter which rows are decoded
    together; where memory runs out, fewer are.
    """
    role = model.table[role_name]
    stop_ids = model.stop_ids(sampling.stop_token_ids)
    stop_strings = StopStrings(sampling.stop_strings, partial(chat.decode_response, stop_ids=()))
    keys = list(zip(prompts.prompt_index.tolist(), prompts.sample_index.tolist(), strict=True))
    draws = torch.stack([uniforms(sampling.max_response_tokens, *stream, *key) for key in keys])
    job = Sampling(
        trunk=model.trunk(role.trunk),
        adapter=role.adapter,
        prompts=prompts.tokens,
        prompt_mask=prompts.attention_mask,
        uniforms=draws.to(prompts.tokens.device),
        config=sampling,
        stop_ids=stop_ids,
        pad_id=model.pad_id,
        same_prompt=[prompt for prompt, _ in keys],
        stop_strings=stop_strings if sampling.stop_strings else None,
        after_token=after_token,
        tile_bytes=model.logit_tile_bytes,
    )
    finish_rows(limits, len(keys), partial(finish, job))
    sampled = job.result()
    rows = zip(sampled.tokens.cpu(), sampled.mask.cpu(), strict=True)
    batch = TokenBatch(
        tokens=torch.cat([prompts.tokens, sampled.tokens], dim=1),
        attention_mask=torch.cat([prompts.attention_mask, sampled.mask], dim=1),
        response_mask=sampled.mask,
    )
    return Responses(
        batch=batch,
        logprobs=sampled.logprobs,
        texts=[stop_strings.cut(chat.decode_response(row[keep].tolist(), stop_ids)) for row, keep in rows],
        ended=sampled.ended,
    )


@torch.no_grad()
def score_roles(
    model: HydraModel, batch: TokenBatch, roles: Iterable[str], *, temperature: float, limits: StageLimits
) -> Scored:
    """What the named roles say about every row, with one trunk pass per (trunk, adapter) and micro-batch.

    Where memory runs out, all of it is done again in smaller micro-batches and not only what is missing: an update over
    the whole batch is cut the same way then, and begins with ratios of exactly one.
    """
    names = list(roles)

    def look(rows: Tensor, micro_batch: TokenBatch) -> tuple[Tensor, dict[str, RoleOutput]]:
        return rows, model.evaluate(micro_batch, names, temperature=temperature)

    mask = batch.response_mask
    fields: dict[str, Tensor] = {}
    for rows, outputs in map_micro_batches(limits, partial(micro_batches, batch), look):
        for role in names:
            for source, field in FIELDS_OF[role].items():
                value: Tensor = getattr(outputs[role], source)
                if field not in fields:
                    fields[field] = value.new_zeros(mask.shape[: value.dim()])
                if value.dim() == 1:
                    fields[field][rows] = value
                else:
                    fields[field][rows, : value.shape[1]] = value
    nothing = torch.zeros(mask.shape, device=mask.device)
    return Scored(
        logprobs=fields.get("logprobs", nothing),
        entropy=fields.get("entropy", nothing),
        ref_logprobs=fields.get("ref_logprobs", nothing),
        values=fields.get("values", nothing),
        scores=fields.get("scores", nothing[:, 0]),
    )


def collect_rollout(
    model: HydraModel,
    prompts: PromptBatch,
    responses: Responses,
    reward: RewardConfig,
    *,
    temperature: float,
    limits: StageLimits,
    reward_fn: Scoring | None,
    roles: Iterable[str] | None = None,
) -> Rollout:
    """Let roles (default: all of the method's table) look once at the sampled responses, and add up their scores.

    What the others would say is zero, but for the actor's log-probs, which are then those of sampling.
    """
    looking = tuple(model.table if roles is None else roles)
    scored = score_roles(model, responses.batch, looking, temperature=temperature, limits=limits)
    head = {"head": scored.scores} if "reward" in model.table else {}
    added = as_sources(reward_fn, reward).add_to(
        reward.reward_model_coef * scored.scores, prompts, responses, max_failed_frac=reward.max_failed_frac
    )
    return Rollout(
        batch=responses.batch,
        prompts=prompts,
        responses=responses.texts,
        ended=responses.ended,
        logprobs=scored.logprobs if "actor" in looking else responses.logprobs,
        ref_logprobs=scored.ref_logprobs,
        values=torch.where(responses.batch.response_mask, scored.values, 0.0),
        entropy=scored.entropy,
        scores=added.scores,
        dense_rewards=added.dense_rewards,
        valid=added.valid,
        baselines=torch.zeros_like(added.scores),
        source_scores=head | added.source_scores,
    )


def sequence_kl(rollout: Rollout) -> Float[Tensor, " b"]:
    """The k1 estimate of KL(actor || reference) in nats per response, at the sampling temperature."""
    mask = rollout.batch.response_mask
    return torch.where(mask, rollout.logprobs - rollout.ref_logprobs, 0.0).sum(dim=1)


def summarise(rollout: Rollout) -> dict[str, float]:
    """Score, KL and shape of a rollout, for the log: units as in docs/metrics.md. Scores and KL are of valid rows."""
    mask = rollout.batch.response_mask
    scores = rollout.scores[rollout.valid]
    return {
        "score/mean": scores.mean().item(),
        "score/std": scores.std(correction=0).item(),
        **source_metrics(rollout.source_scores),
        "reward/masked_frac": 1 - rollout.valid.float().mean().item(),
        "kl/reference": sequence_kl(rollout)[rollout.valid].mean().item(),
        "ppo/entropy": (torch.where(mask, rollout.entropy, 0.0).sum() / mask.sum()).item(),
        "response/tokens_mean": mask.sum(dim=1).float().mean().item(),
        "response/eos_frac": rollout.ended.float().mean().item(),
    }
