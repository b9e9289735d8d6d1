"""THE PPO loop: act, judge, learn, record. One loop for every method; what differs is in the table of roles."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from hydra_rlhf.algorithms.advantages import explained_variance
from hydra_rlhf.algorithms.kl import kl_estimate, next_kl_coef
from hydra_rlhf.algorithms.masking import zero_outside
from hydra_rlhf.algorithms.rewards import shape_scores, token_rewards, update_moments
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.config_checks import kl_estimator, kl_place
from hydra_rlhf.data.formats import ChatFormat, TokenizedPrompt
from hydra_rlhf.errors import Interrupted
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.records import PPOTargets, Rollout
from hydra_rlhf.stages.estimators import check_roles, describe_groups, estimate_advantages
from hydra_rlhf.stages.greedy import respond_greedily, score_greedy, with_baselines
from hydra_rlhf.stages.held_out import HeldOut
from hydra_rlhf.stages.limits import StageLimits
from hydra_rlhf.stages.ppo_single import learn_in_one_pass, learns_while_scoring, roles_to_score
from hydra_rlhf.stages.ppo_state import PPOState, build_optimizers, restore, save
from hydra_rlhf.stages.ppo_update import update
from hydra_rlhf.stages.rollout import (
    collect_rollout,
    prompt_batch,
    prompt_rows,
    sample_responses,
    summarise,
)
from hydra_rlhf.stages.sample_records import rollout_samples
from hydra_rlhf.stages.scoring.reward_sources import Scoring, next_moments, with_moments
from hydra_rlhf.stages.session import Session, due
from hydra_rlhf.stages.timing import Stopwatch


def train_ppo_stage(
    session: Session,
    model: HydraModel,
    chat: ChatFormat,
    prompts: Sequence[TokenizedPrompt],
    config: PPOConfig,
    *,
    seed: int,
    reward_fn: Scoring | None = None,
    held_out: HeldOut | None = None,
    limits: StageLimits | None = None,
) -> PPOState:
    """Stage 2 on a model that stage 1 left. Resumes from the run's newest checkpoint; returns the final state."""
    check_roles(model.table, config)
    optimizers = build_optimizers(model, config)
    fresh = PPOState(kl_coef=config.kl_coef, limits=limits or StageLimits.of(config))
    restored = restore(session.begin("ppo"), model, optimizers)
    state = fresh if restored is None else replace(restored, limits=restored.limits.at_most(fresh.limits))
    saved_step = state.step
    with session.progress("ppo", config.num_steps, done=state.step) as progress:
        while state.step < config.num_steps:
            watch = Stopwatch(session.memory)

            # Act: sample responses, then let every role look at them once.
            try:
                session.stop.check()
                with watch.phase("rollout"):
                    rows = prompt_rows(len(prompts), config.rollout_batch_size, state.step, seed, "ppo")
                    batch = prompt_batch(prompts, rows, config.samples_per_prompt, model.pad_id, model.device)
                    stream = (seed, "ppo", state.step)
                    responses = sample_responses(
                        model,
                        chat,
                        "actor",
                        batch,
                        config.sampling,
                        stream=stream,
                        limits=state.limits,
                        after_token=session.stop.check,
                    )
                    greedy = respond_greedily(
                        model, chat, batch, config, stream=stream, limits=state.limits, after_token=session.stop.check
                    )
            except Interrupted:  # nothing has been learned since the last step, so that is what is saved
                if state.step > saved_step:
                    save(session, model, optimizers, state)
                raise
            scoring = roles_to_score(model.table, config, step=state.step)
            with watch.phase("score"):
                rollout = collect_rollout(
                    model,
                    batch,
                    responses,
                    config.reward,
                    temperature=config.sampling.temperature,
                    limits=state.limits,
                    reward_fn=with_moments(reward_fn, state.source_moments),
                    roles=scoring,
                )
                baselines = score_greedy(model, greedy, rollout, config, state.limits, reward_fn, state.source_moments)

            # Judge: turn scores and token KL into rewards, and rewards into advantages and returns.
            moments = update_moments(state.moments, rollout.scores)
            source_moments = next_moments(state.source_moments, rollout.source_scores, config.reward)
            scale = moments.scale if config.reward.normalize else 1.0
            rollout = with_baselines(rollout, baselines, config, scale=scale)

            # Learn: a few passes of clipped updates over the same rollout; a single one scores it on the way.
            with watch.phase("update"):
                if learns_while_scoring(model, scoring):
                    rewards = judge_tokens(rollout, config, kl_coef=state.kl_coef, scale=scale)
                    rollout, targets, metrics = learn_in_one_pass(
                        model,
                        optimizers,
                        rollout,
                        rewards,
                        config,
                        kl_coef=loss_kl_coef(config, state.kl_coef),
                        limits=state.limits,
                    )
                else:
                    targets = judge(rollout, config, kl_coef=state.kl_coef, scale=scale)
                    metrics = update(
                        model, optimizers, rollout, targets, config, step=state.step, seed=seed, limits=state.limits
                    )

            # Record: log, steer the KL coefficient, look at held-out prompts, save.
            metrics |= describe(rollout, targets, kl_coef=state.kl_coef)
            metrics |= describe_critic(rollout, targets) if "critic" in model.table else {}
            metrics |= describe_groups(targets.rewards, rollout, config)
            num_tokens = int(rollout.batch.response_mask.sum())
            metrics |= watch.metrics({"rollout": num_tokens, "update": num_tokens * config.num_epochs})
            state = replace(
                state,
                step=state.step + 1,
                moments=moments,
                source_moments=source_moments,
                held_out_moments=state.held_out_moments or source_moments,
                kl_coef=steered_kl_coef(config, state.kl_coef, metrics["kl/reference"], int(rollout.valid.sum())),
            )
            if held_out is not None and config.eval_every and due(config.eval_every, state.step, config.num_steps):
                seen, samples = held_out.look(
                    model, chat, config, seed=seed, limits=state.limits, moments=state.held_out_moments
                )
                metrics |= seen
                if seen["eval/score"] > (-math.inf if state.best_score is None else state.best_score):
                    state = replace(state, best_step=state.step, best_score=seen["eval/score"])
                for sample in samples:
                    session.log_sample({"stage": "ppo", "step": state.step, "kind": "held_out", **sample})
            if session.keeps_samples:
                for sample in rollout_samples(model, chat, rollout, targets, config, limits=state.limits):
                    session.log_sample({"stage": "ppo", "step": state.step, "kind": "rollout", **sample})
            session.log("ppo", state.step, metrics | state.limits.metrics())
            progress.advance(num_tokens, {"score": metrics["score/mean"], "KL": metrics["kl/reference"]})
            is_best = state.best_step == state.step
            if due(config.save_every, state.step, config.num_steps) or is_best:
                save(session, model, optimizers, state)
                saved_step = state.step
    return state


def judge_tokens(rollout: Rollout, config: PPOConfig, *, kl_coef: float, scale: float) -> Float[Tensor, "b r"]:
    """Rewards of a rollout; `scale` divides scores (running standard deviation, or 1). Invalid rows have none."""
    shaped = shape_scores(
        rollout.scores,
        rollout.ended,
        clip=config.reward.clip,
        missing_eos_penalty=config.reward.missing_eos_penalty,
        scale=scale,
    )
    estimator = kl_estimator(config)
    if estimator != "none" and kl_place(config) == "reward":
        kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, estimator)
    else:
        kl = torch.zeros_like(rollout.logprobs)
    mask = rollout.batch.response_mask
    rewards = token_rewards(shaped, rollout.dense_rewards / scale, kl, mask, kl_coef=kl_coef)
    return zero_outside(rewards, rollout.learn_mask)


def judge(rollout: Rollout, config: PPOConfig, *, kl_coef: float, scale: float) -> PPOTargets:
    """Rewards, advantages and returns of a rollout that every role has scored.

    Rows that are not valid have none of them, and count in no mean or spread.
    """
    rewards = judge_tokens(rollout, config, kl_coef=kl_coef, scale=scale)
    advantages, returns = estimate_advantages(rewards, rollout, config)
    return PPOTargets(rewards=rewards, advantages=advantages, returns=returns, kl_coef=loss_kl_coef(config, kl_coef))


def loss_kl_coef(config: PPOConfig, kl_coef: float) -> float:
    """Weight of a KL term in the loss; 0 where the KL is in the rewards, or nowhere."""
    return kl_coef if kl_estimator(config) != "none" and kl_place(config) == "loss" else 0.0


def steered_kl_coef(config: PPOConfig, kl_coef: float, measured_kl: float, num_sequences: int) -> float:
    """The next step's KL coefficient: adaptive with `kl_target`, else unchanged."""
    if config.kl_target is None:
        return kl_coef
    return next_kl_coef(
        kl_coef, measured_kl, target=config.kl_target, horizon=config.kl_horizon, num_sequences=num_sequences
    )


def describe(rollout: Rollout, targets: PPOTargets, *, kl_coef: float) -> dict[str, float]:
    """Metrics of a rollout and of what it is learned from."""
    mask = rollout.learn_mask
    return {
        **summarise(rollout),
        "reward/mean": torch.where(mask, targets.rewards, 0.0).sum(dim=1)[rollout.valid].mean().item(),
        "kl/coef": kl_coef,
    }


def describe_critic(rollout: Rollout, targets: PPOTargets) -> dict[str, float]:
    """Metrics of the values that advantages were estimated with."""
    explained = explained_variance(rollout.values, targets.returns, rollout.learn_mask)
    return {"ppo/explained_variance": explained.item()}
