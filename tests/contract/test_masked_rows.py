"""A response that a source could not score is no part of anything that is learned, as if it had never been sampled."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from contract.test_methods import gradients
from contract.test_out_of_memory import wide_hydra
from contract.tiny import chat, ppo_config, prompts, snapshot, tiny_hydra
from hydra_rlhf.config import PPOConfig, Recipe, RewardConfig
from hydra_rlhf.config_rewards import SourceConfig
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.records import Rollout, TokenBatch
from hydra_rlhf.runtime.run import Run
from hydra_rlhf.stages.held_out import HeldOut
from hydra_rlhf.stages.limits import StageLimits
from hydra_rlhf.stages.ppo import describe, judge, train_ppo_stage
from hydra_rlhf.stages.ppo_state import build_optimizers
from hydra_rlhf.stages.ppo_update import minibatches, update
from hydra_rlhf.stages.rollout import collect_rollout, prompt_batch, sample_responses
from hydra_rlhf.stages.scoring.kinds import open_sources
from hydra_rlhf.stages.scoring.outcomes import Outcome, ScoreRequest, check_returned
from hydra_rlhf.stages.scoring.reward_sources import OpenSource, RewardSources
from hydra_rlhf.stages.session import Session

MASKED = 3


def failing(*rows: int) -> RewardSources:
    """A source whose scores are NaN in these rows, and are left out for it."""

    def call(request: ScoreRequest) -> list[Outcome]:
        scores = [math.nan if row in rows else 0.3 * row for row in range(len(request.responses))]
        return check_returned(scores, request.lengths)

    config = SourceConfig(name="judge", weight=2.0, on_failure="mask")
    return RewardSources(sources=(OpenSource(config=config, call=call),))


def rollout_of(hydra: HydraModel, config: PPOConfig, sources: RewardSources) -> Rollout:
    batch = prompt_batch(prompts(), [*range(6), 0, 1], 1, 0, torch.device("cpu"))
    limits = StageLimits.of(config)
    responses = sample_responses(hydra, chat(hydra), "actor", batch, config.sampling, stream=(0, 0), limits=limits)
    return collect_rollout(hydra, batch, responses, config.reward, temperature=1.0, limits=limits, reward_fn=sources)


def without(rollout: Rollout, row: int) -> Rollout:
    """The rollout of the other rows alone."""
    keep = torch.arange(len(rollout.responses)) != row

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[keep]
        if isinstance(value, list):
            return [entry for entry, kept in zip(value, keep.tolist(), strict=True) if kept]
        return {name: cut(entry) for name, entry in value.items()}

    def cut_fields(record: Any, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: cut(getattr(record, name)) for name in names}

    batch = TokenBatch(**cut_fields(rollout.batch, ("tokens", "attention_mask", "response_mask")))
    rest = tuple(name for name in Rollout.__dataclass_fields__ if name not in ("batch", "prompts"))
    others = replace(rollout.prompts, **cut_fields(rollout.prompts, tuple(rollout.prompts.__dataclass_fields__)))
    return Rollout(batch=batch, prompts=others, **cut_fields(rollout, rest))


def wide(rollout: Rollout) -> Rollout:
    """What a rollout is learned from in float64, with other noise on it than rounding."""
    names = ("logprobs", "ref_logprobs", "values", "entropy", "scores", "dense_rewards")
    return replace(rollout, **{name: getattr(rollout, name).double() for name in names})


SETTINGS = {
    "KL in the reward": {},
    "KL in the loss, entropy bonus": {"kl_in": "loss", "kl_estimator": "k3", "entropy_coef": 0.1},
}


@pytest.mark.parametrize("method", ["hydra-ppo", "j-hydra-ppo"])
@pytest.mark.parametrize("case", SETTINGS)
def test_gradients_are_those_of_the_batch_without_the_row(method: str, case: str) -> None:
    """In float64 to 1e-12 of each entry, whatever the micro-batches; and the row's own numbers change no bit."""
    hydra = wide_hydra(method, torch.float64)
    config = ppo_config(
        num_epochs=1,
        minibatch_size=8,
        micro_batch_tokens=24,
        reward=RewardConfig(missing_eos_penalty=0.5),
        **SETTINGS[case],
    )
    alone = replace(config, rollout_batch_size=7, minibatch_size=7)
    rollout = wide(rollout_of(hydra, config, failing(MASKED)))
    assert rollout.valid.tolist() == [row != MASKED for row in range(8)]
    assert rollout.scores[MASKED].isnan()
    rest = without(rollout, MASKED)
    targets, expected = (judge(one, config, kl_coef=0.3, scale=1.7) for one in (rollout, rest))
    keep = rollout.valid
    for name in ("rewards", "advantages", "returns"):
        assert_close(getattr(targets, name)[keep], getattr(expected, name), atol=1e-12, rtol=0)
        assert not getattr(targets, name)[MASKED].any(), name
    ours, theirs = gradients(hydra, config, rollout, targets), gradients(hydra, alone, rest, expected)
    assert ours.keys() == theirs.keys()
    assert any(grad.abs().max() > 1e-3 for grad in theirs.values())
    for name, grad in theirs.items():
        assert_close(ours[name], grad, atol=1e-12, rtol=0)
    # Another score, other rewards and values in that row: not a bit changes.
    spoilt = {name: getattr(rollout, name).clone() for name in ("scores", "dense_rewards", "values")}
    for tensor, value in zip(spoilt.values(), (1e30, math.inf, math.nan), strict=True):
        tensor[MASKED] = value
    other = replace(rollout, **spoilt)
    again = gradients(hydra, config, other, judge(other, config, kl_coef=0.3, scale=1.7))
    assert all(torch.equal(again[name], grad) for name, grad in ours.items())


def test_an_unmasked_row_does_count() -> None:
    """The test above could fail: with the row valid, gradients differ."""
    hydra = wide_hydra("hydra-ppo", torch.float64)
    config = ppo_config(num_epochs=1, minibatch_size=8, micro_batch_tokens=24)
    rollout = wide(rollout_of(hydra, config, failing()))
    rest = without(rollout, MASKED)
    alone = replace(config, rollout_batch_size=7, minibatch_size=7)
    ours = gradients(hydra, config, rollout, judge(rollout, config, kl_coef=0.3, scale=1.0))
    theirs = gradients(hydra, alone, rest, judge(rest, config, kl_coef=0.3, scale=1.0))
    assert any(not torch.allclose(ours[name], grad, atol=1e-6) for name, grad in theirs.items())


def test_metrics_are_those_of_the_valid_rows() -> None:
    hydra = tiny_hydra("hydra-ppo")
    config = ppo_config()
    rollout = rollout_of(hydra, config, failing(MASKED, 5))
    seen = describe(rollout, judge(rollout, config, kl_coef=0.0, scale=1.0), kl_coef=0.0)
    scores = [rollout.scores[row].item() for row in range(8) if row not in (MASKED, 5)]
    assert seen["score/mean"] == pytest.approx(sum(scores) / 6, abs=1e-5)
    assert seen["reward/mean"] == pytest.approx(seen["score/mean"], abs=1e-5)
    assert seen["reward/masked_frac"] == pytest.approx(0.25)
    assert seen["reward/judge_failed"] == 2
    assert seen["reward/judge_mean"] == pytest.approx(0.3 * (0 + 1 + 2 + 4 + 6 + 7) / 6, abs=1e-6)
    assert math.isfinite(seen["reward/head_mean"])
    assert all(math.isfinite(value) for value in seen.values())


def test_the_kl_is_that_of_the_valid_rows() -> None:
    """Row k is 10 + k nats from the reference, over its tokens: the mean over 0, 1, 2, 4, 6 and 7 is 10 + 20 / 6."""
    hydra = tiny_hydra("hydra-ppo")
    config = ppo_config()
    rollout = rollout_of(hydra, config, failing(MASKED, 5))
    mask = rollout.batch.response_mask
    distances = (10.0 + torch.arange(8.0))[:, None] / mask.sum(dim=1, keepdim=True)
    far = replace(rollout, logprobs=rollout.ref_logprobs + torch.where(mask, distances, 0.0))
    seen = describe(far, judge(far, config, kl_coef=0.0, scale=1.0), kl_coef=0.0)
    assert seen["kl/reference"] == pytest.approx(10 + 20 / 6, abs=1e-4)


def test_the_kl_coefficient_is_steered_by_the_valid_rows(tmp_path) -> None:
    """At first the KL is zero, 20 % and more below its target: of a horizon of 100 sequences each valid one lowers the
    coefficient by 0.2 %."""
    config = ppo_config(kl_coef=0.5, kl_target=1.0, kl_horizon=100, reward=RewardConfig(max_failed_frac=0.9))
    recipe = Recipe(name="steered", output_dir=str(tmp_path), ppo=config)
    hydra = tiny_hydra("hydra-ppo")
    with Run.open(recipe, resume=False) as run, flaky(config) as opened:
        session = Session(run)
        train_ppo_stage(session, hydra, chat(hydra), prompts(), config, seed=3, reward_fn=opened)
    first, second = session.history
    num_valid = round(8 * (1 - first["reward/masked_frac"]))
    assert 0 < num_valid < 8
    assert first["kl/coef"] == 0.5
    assert second["kl/coef"] == pytest.approx(0.5 * (1 - 0.002 * num_valid), abs=1e-9)


def test_a_minibatch_without_a_valid_row_is_left_out() -> None:
    """Its optimizers do not step, and the others' metrics are finite."""
    hydra = tiny_hydra("hydra-ppo")
    config = ppo_config(num_epochs=1, minibatch_size=2, rollout_batch_size=8)
    first = next(iter(minibatches(8, config, step=0, seed=0)))
    rollout = rollout_of(hydra, config, failing(*first))
    optimizers = build_optimizers(hydra, config)
    metrics = update(hydra, optimizers, rollout, judge(rollout, config, kl_coef=0.1, scale=1.0), config, step=0, seed=0)
    assert {int(optimizer.state()["num_steps"]) for optimizer in optimizers.values()} == {3}
    assert metrics["optim/skipped_steps"] == 0
    assert all(math.isfinite(value) for value in metrics.values())


@contextmanager
def flaky(config: PPOConfig) -> Iterator[RewardSources]:
    """Sources of which one fails at a few responses, by what they are and not by when they are asked."""

    def reward_fn(prompts: list[str], responses: list[str]) -> list[float]:
        return [float(len(text)) for text in responses]

    def call(request: ScoreRequest) -> list[Outcome]:
        scores = [math.nan if sum(ids) % 9 == 0 else float(sum(ids) % 7) for ids in request.response_ids]
        return check_returned(scores, request.lengths)

    with open_sources(config.reward, reward_fn=reward_fn) as opened:
        by_ids = OpenSource(config=SourceConfig(name="ids", on_failure="mask"), call=call)
        yield replace(opened, sources=(*opened.sources, by_ids))


def test_resumed_runs_with_failures_and_running_units_are_bit_equal(tmp_path) -> None:
    """Four steps at a stretch, and the same four in two lives: nothing is kept anywhere but in the checkpoint."""
    sources = ({"name": "short", "kind": "length", "maximum": 3, "normalize": True},)
    config = ppo_config(
        num_steps=4,
        save_every=2,
        eval_every=2,
        num_eval_prompts=3,
        reward=RewardConfig(sources=sources, max_failed_frac=0.9, normalize=True),  # pyright: ignore[reportArgumentType]
    )
    found = {}
    for name, lives in (("straight", (4,)), ("resumed", (2, 4))):
        recipe = Recipe(name=name, output_dir=str(tmp_path), ppo=config)
        lines: list[dict[str, Any]] = []
        for life, last in enumerate(lives):
            hydra = tiny_hydra("hydra-ppo")
            with Run.open(recipe, resume=life > 0) as run, flaky(config) as opened:
                session = Session(run)
                held_out = HeldOut(prompts=prompts(), reward_fn=opened)
                if last < 4:
                    session.stop.check = stop_after(session, last)  # pyright: ignore[reportAttributeAccessIssue]
                    with pytest.raises(KeyboardInterrupt):
                        train_ppo_stage(
                            session, hydra, chat(hydra), prompts(), config, seed=3, reward_fn=opened, held_out=held_out
                        )
                else:
                    train_ppo_stage(
                        session, hydra, chat(hydra), prompts(), config, seed=3, reward_fn=opened, held_out=held_out
                    )
            lines += session.history
        found[name] = (snapshot(hydra), [stable(line) for line in lines])  # pyright: ignore
    (straight, straight_lines), (resumed, resumed_lines) = found["straight"], found["resumed"]
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert straight_lines == resumed_lines
    assert len(straight_lines) == 4
    assert any(line["reward/masked_frac"] > 0 for line in straight_lines)
    assert {"reward/head_mean", "reward/reward_fn_mean", "reward/short_std", "reward/ids_failed"} <= straight_lines[
        0
    ].keys()


def stop_after(session: Session, step: int):
    """A check that stops the run once `step` steps are logged."""

    def check() -> None:
        if len(session.history) == step:
            raise KeyboardInterrupt

    return check


def stable(line: dict[str, Any]) -> dict[str, Any]:
    """A logged line without time and memory."""
    return {
        key: value for key, value in line.items() if not key.startswith(("time/", "memory/")) and "per_s" not in key
    }
