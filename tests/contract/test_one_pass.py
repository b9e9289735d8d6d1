"""One forward where others take two: the step is the one that scoring and an update give one after the other."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from contract.test_methods import rollout_of
from contract.test_out_of_memory import ENOMEM, wide_hydra
from contract.tiny import METHODS, chat, ppo_config, prompts, randomise_adapters, tiny_hydra
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.roles import ROLES, without_roles
from hydra_rlhf.runtime.optimizer import Optimizer
from hydra_rlhf.stages.limits import StageLimits
from hydra_rlhf.stages.ppo import judge, judge_tokens, loss_kl_coef, train_ppo_stage
from hydra_rlhf.stages.ppo_single import learn_in_one_pass, roles_to_score
from hydra_rlhf.stages.ppo_state import build_optimizers
from hydra_rlhf.stages.ppo_update import update
from hydra_rlhf.stages.rollout import collect_rollout, prompt_batch, sample_responses
from hydra_rlhf.stages.session import Session

ONCE: dict[str, Any] = {"num_epochs": 1, "minibatch_size": 8, "rollout_batch_size": 8}
LOSSES: dict[str, dict[str, Any]] = {
    "KL in the reward": {},
    "KL in the loss, entropy bonus": {"kl_in": "loss", "entropy_coef": 0.1},
    "scaled scores, no KL": {"kl_estimator": "none"},
}


def catch_gradients(hydra: HydraModel, config: PPOConfig) -> tuple[dict[Any, Optimizer], dict[str, Tensor]]:
    """Optimizers that leave every gradient they are given in the second result."""
    optimizers = build_optimizers(hydra, config)
    names = {id(p): name for name, p in hydra.named_parameters()}
    caught: dict[str, Tensor] = {}
    for optimizer in optimizers.values():

        def catch(groups=None, optimizer=optimizer):
            held = {names[id(p)]: p.grad.clone() for p in optimizer._params.values() if p.grad is not None}
            assert not held.keys() & caught.keys(), "an optimizer stepped twice"
            caught.update(held)
            return Optimizer.step(optimizer, groups)

        optimizer.step = catch  # pyright: ignore[reportAttributeAccessIssue]
    return optimizers, caught


def one_pass(hydra: HydraModel, config: PPOConfig, *, scale: float, limits: StageLimits | None = None):
    """(rollout, targets, metrics, gradients) of a step whose actor and critic run forward once."""
    limits = limits or StageLimits.of(config)
    batch = prompt_batch(prompts(), [*range(6), 0, 1], 1, 0, torch.device("cpu"))
    responses = sample_responses(hydra, chat(hydra), "actor", batch, config.sampling, stream=(0, 0), limits=limits)
    rollout = collect_rollout(
        hydra,
        batch,
        responses,
        config.reward,
        temperature=config.sampling.temperature,
        limits=limits,
        reward_fn=None,
        roles=roles_to_score(hydra.table, config, step=0),
    )
    rewards = judge_tokens(rollout, config, kl_coef=0.1, scale=scale)
    optimizers, caught = catch_gradients(hydra, config)
    kl_coef = loss_kl_coef(config, 0.1)
    return *learn_in_one_pass(hydra, optimizers, rollout, rewards, config, kl_coef=kl_coef, limits=limits), caught


@pytest.mark.parametrize("changes", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("method", METHODS)
def test_one_forward_gives_what_two_give(method: str, changes: dict[str, Any]):
    scale = 3.0
    config = ppo_config(**ONCE, **changes)
    hydra = wide_hydra(method, torch.float64)
    expected_rollout = rollout_of(hydra, config)
    expected_targets = judge(expected_rollout, config, kl_coef=0.1, scale=scale)
    optimizers, expected = catch_gradients(hydra, config)
    expected_metrics = update(hydra, optimizers, expected_rollout, expected_targets, config, step=0, seed=0)

    rollout, targets, metrics, found = one_pass(wide_hydra(method, torch.float64), config, scale=scale)
    for name in ("logprobs", "values", "entropy", "ref_logprobs"):
        assert_close(getattr(rollout, name), getattr(expected_rollout, name), atol=1e-6, rtol=0)
    for name in ("rewards", "advantages", "returns"):
        assert_close(getattr(targets, name), getattr(expected_targets, name), atol=1e-6, rtol=0)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, atol=1e-6 * gradient.abs().max().item(), rtol=0)
    assert metrics["rollout/logprob_gap"] < 1e-6
    for key in expected_metrics:
        assert metrics[key] == pytest.approx(expected_metrics[key], rel=1e-5, abs=1e-6), key
    assert metrics["ppo/ratio_max"] == metrics["ppo/ratio_min"] == 1.0


@pytest.mark.parametrize(("method", "num_passes"), [("hydra-ppo", 3), ("j-hydra-ppo", 2)])
def test_each_role_that_learns_runs_forward_once(method: str, num_passes: int):
    """Trunk passes of a step: LoRA off, critic, actor, and not twice two of them; or LoRA off and both together."""
    hydra = tiny_hydra(method)
    calls = record_calls(hydra)
    one_pass(hydra, ppo_config(**ONCE, micro_batch_tokens=10_000), scale=1.0)
    assert calls[0] == (("reference", "reward"), False)
    learning = [("critic",), ("actor",)] if num_passes == 3 else [("critic", "actor")]
    assert calls[1:] == [(roles, True) for roles in learning]


@pytest.mark.parametrize(("kept", "num_again"), [(1, 2), (2, 1), (3, 0), (100, 0)])
def test_graphs_of_a_joined_pass_wait_for_all_values(kept: int, num_again: int):
    """Three micro-batches: those whose graph is kept run forward once, the others twice; the gradients are equal."""
    config = ppo_config(**ONCE, micro_batch_tokens=40, entropy_coef=0.1)
    expected_hydra = wide_hydra("j-hydra-ppo", torch.float64)
    rollout = rollout_of(expected_hydra, config)
    optimizers, expected = catch_gradients(expected_hydra, config)
    update(expected_hydra, optimizers, rollout, judge(rollout, config, kl_coef=0.1, scale=1.0), config, step=0, seed=0)

    hydra = wide_hydra("j-hydra-ppo", torch.float64)
    calls = record_calls(hydra)
    *_, found = one_pass(hydra, config, scale=1.0, limits=StageLimits(micro_batch_tokens=40, kept_graphs=kept))
    assert [roles for roles, _ in calls[:3]] == [("reference", "reward")] * 3
    assert {frozenset(roles) for roles, _ in calls[3:]} == {frozenset(("actor", "critic"))}
    graphs = [with_graph for _, with_graph in calls[3:]]
    assert graphs == [False] * (3 - min(3, kept)) + [True] * min(3, kept) + [True] * num_again
    for name, gradient in expected.items():
        assert_close(found[name], gradient, atol=1e-6 * gradient.abs().max().item(), rtol=0)


@pytest.mark.parametrize(("failing", "left"), [(1, (40, 1)), (3, (40, 1)), (4, (40, 1))])
def test_fewer_graphs_wait_where_memory_runs_out(failing: int, left: tuple[int, int]):
    """In the first look, in the last, and where learning begins: graphs are given up before micro-batches are cut."""
    config = ppo_config(**ONCE, micro_batch_tokens=40)
    *_, expected = one_pass(wide_hydra("j-hydra-ppo", torch.float64), config, scale=1.0)
    hydra = wide_hydra("j-hydra-ppo", torch.float64)
    run_out_in_call(hydra, failing)
    limits = StageLimits(micro_batch_tokens=40, kept_graphs=2)
    *_, found = one_pass(hydra, config, scale=1.0, limits=limits)
    assert (limits.micro_batch_tokens, limits.kept_graphs, limits.num_retries) == (*left, 1)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, atol=1e-10, rtol=0)


def run_out_in_call(hydra: HydraModel, number: int) -> None:
    """Let memory run out in this call of the joined pass, from 1."""
    evaluate, seen = hydra.evaluate, []

    def fails_once(batch, roles, **arguments):
        outputs = evaluate(batch, tuple(roles), **arguments)
        if "actor" in outputs:
            seen.append(roles)
            if len(seen) == number:
                raise torch.OutOfMemoryError(ENOMEM)
        return outputs

    hydra.evaluate = fails_once  # pyright: ignore[reportAttributeAccessIssue]


def record_calls(hydra: HydraModel) -> list[tuple[tuple[str, ...], bool]]:
    """(roles, with their graph) of every pass from now on."""
    calls: list[tuple[tuple[str, ...], bool]] = []
    evaluate = hydra.evaluate

    def record(batch, roles, **arguments):
        roles = tuple(roles)
        calls.append((roles, torch.is_grad_enabled()))
        return evaluate(batch, roles, **arguments)

    hydra.evaluate = record  # pyright: ignore[reportAttributeAccessIssue]
    return calls


@pytest.mark.parametrize("role", ["critic", "actor"])
def test_memory_that_runs_out_leaves_the_same_gradients(role: str):
    config = ppo_config(**ONCE, micro_batch_tokens=10_000)
    *_, expected = one_pass(wide_hydra("hydra-ppo", torch.float64), config, scale=1.0)
    hydra = wide_hydra("hydra-ppo", torch.float64)
    evaluate, failed = hydra.evaluate, []

    def fails_once(batch, roles, **arguments):
        outputs = evaluate(batch, tuple(roles), **arguments)
        if role in outputs and not failed:
            failed.append(role)
            raise torch.OutOfMemoryError(ENOMEM)
        return outputs

    hydra.evaluate = fails_once  # pyright: ignore[reportAttributeAccessIssue]
    limits = StageLimits.of(config)
    *_, found = one_pass(hydra, config, scale=1.0, limits=limits)
    assert limits.num_retries == 1
    for name, gradient in expected.items():
        assert_close(found[name], gradient, atol=1e-10, rtol=0)


def test_masked_rows_learn_nothing_here_either():
    """Rows whose score failed: the gradients of an update of the same rollout, and nothing at all where all failed."""
    config = ppo_config(**ONCE, kl_estimator="none")
    hydra = wide_hydra("hydra-ppo", torch.float64)
    rollout = rollout_of(hydra, config)
    valid = torch.tensor([True, False, True, True, False, True, True, True])
    rollout = replace(rollout, valid=valid, scores=torch.where(valid, rollout.scores, torch.nan))
    optimizers, expected = catch_gradients(hydra, config)
    update(hydra, optimizers, rollout, judge(rollout, config, kl_coef=0.1, scale=1.0), config, step=0, seed=0)

    def found_with(rollout):
        hydra = wide_hydra("hydra-ppo", torch.float64)
        optimizers, caught = catch_gradients(hydra, config)
        rewards = judge_tokens(rollout, config, kl_coef=0.1, scale=1.0)
        limits = StageLimits.of(config)
        learn_in_one_pass(hydra, optimizers, rollout, rewards, config, kl_coef=0.0, limits=limits)
        return caught

    for name, gradient in found_with(rollout).items():
        assert_close(gradient, expected[name], atol=1e-10, rtol=0)
    assert found_with(replace(rollout, valid=torch.zeros_like(valid))) == {}


def test_who_scores():
    table = ROLES["hydra-ppo"]
    frozen = ("reference", "reward")
    assert roles_to_score(table, ppo_config(**ONCE), step=0) == frozen
    assert roles_to_score(without_roles(table, "critic"), ppo_config(**ONCE), step=0) == frozen
    everyone = tuple(table)
    assert roles_to_score(table, ppo_config(**ONCE, scoring="separate"), step=0) == everyone
    assert roles_to_score(table, ppo_config(**(ONCE | {"num_epochs": 2})), step=0) == everyone
    assert roles_to_score(table, ppo_config(**(ONCE | {"minibatch_size": 4})), step=0) == everyone
    warming = ppo_config(**ONCE, critic_warmup_steps=2)
    assert roles_to_score(table, warming, step=1) == everyone
    assert roles_to_score(table, warming, step=2) == frozen
    assert roles_to_score(ROLES["j-hydra-ppo"], ppo_config(**ONCE), step=0) == frozen


@pytest.mark.parametrize("method", METHODS)
def test_the_loop_learns_either_way(method: str):
    """Three steps with and without separate scoring: the same responses, scores and losses, to float32 rounding."""
    logged = {}
    for scoring in ("auto", "separate"):
        hydra = tiny_hydra(method)
        randomise_adapters(hydra)
        config = ppo_config(**ONCE, num_steps=3, scoring=scoring)
        session = Session()
        train_ppo_stage(session, hydra, chat(hydra), prompts(), config, seed=0)
        logged[scoring] = session.history
    for once, twice in zip(logged["auto"], logged["separate"], strict=True):
        assert "rollout/logprob_gap" in once
        assert "rollout/logprob_gap" not in twice
        for key in ("score/mean", "kl/reference", "ppo/entropy", "loss/policy", "ppo/explained_variance"):
            assert once[key] == pytest.approx(twice[key], rel=2e-3, abs=2e-4), key
        if "critic" in ROLES[method]:
            assert once["loss/value"] == pytest.approx(twice["loss/value"], rel=2e-3, abs=2e-4)
