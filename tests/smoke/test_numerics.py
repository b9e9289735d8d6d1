"""Numbers that are not finite: refused where they come from, skipped where they arise; three in a row end the run."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.tiny import chat, ppo_config, prompts, ragged_batch, snapshot, tiny_hydra
from torch import Tensor

from hydra_rlhf.api import train_hydra_sft
from hydra_rlhf.config import DataConfig, HydraSFTConfig, RewardConfig
from hydra_rlhf.data.sources import PreferencePair
from hydra_rlhf.errors import NonFiniteError, RewardFunctionError
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.records import LossOutput
from hydra_rlhf.runtime.checkpoint import CheckpointStore
from hydra_rlhf.stages import ppo as ppo_loop
from hydra_rlhf.stages import ppo_update
from hydra_rlhf.stages.ppo import train_ppo_stage
from hydra_rlhf.stages.session import Session
from smoke.tiny_runs import exit_code, stable_lines, write_recipe

PAIRS = [PreferencePair(f"the cat {n}", "sat on the mat", f"ran to the dog {n}") for n in range(8)]
NO_TEMPLATE = DataConfig(chat_template="none", max_prompt_tokens=16, max_response_tokens=16)


def train(hydra: HydraModel, session: Session | None = None, **changes: Any) -> list[dict[str, Any]]:
    """PPO with one optimizer step of each optimizer per PPO step; returns what was logged."""
    session = session or Session()
    config = ppo_config(**{"num_epochs": 1, "minibatch_size": 8, **changes})
    train_ppo_stage(session, hydra, chat(hydra), prompts(), config, seed=0)
    return session.history


def changed(before: dict[str, Tensor], hydra: HydraModel) -> set[str]:
    """Names of the tensors of which at least one bit is another."""
    return {name for name, tensor in snapshot(hydra).items() if not torch.equal(tensor, before[name])}


def nan_from_call(function: Callable[..., LossOutput], first: int, last: float = math.inf) -> Callable[..., LossOutput]:
    """A loss whose calls number `first` to `last` (from 1) come out as NaN."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> LossOutput:
        nonlocal calls
        calls += 1
        output = function(*args, **kwargs)
        # Added, not multiplied: the gradient stays finite, so it is the loss itself that must be looked at.
        loss = output.loss + math.nan if first <= calls <= last else output.loss
        return LossOutput(loss=loss, metrics=output.metrics)

    return wrapped


@pytest.mark.parametrize(
    "value",
    [math.inf, -math.inf, math.nan, 1e20, -1e300, 10**400, [0.0, math.nan], [3e38] * 6, "1.0", None, [[1.0]]],
    ids=lambda value: str(value)[:12],
)
def test_a_reward_that_is_no_finite_number_is_refused(value: Any) -> None:
    hydra = tiny_hydra("hydra-ppo")
    before = snapshot(hydra)

    def reward_fn(prompts: list[str], responses: list[str]) -> list[Any]:
        return [0.0, 0.0, value] + [0.0] * (len(responses) - 3)

    with pytest.raises(RewardFunctionError, match=r"^row 2: "):
        train_ppo_stage(
            Session(),
            hydra,
            chat(hydra),
            prompts(),
            ppo_config(),
            seed=0,
            reward_fn=reward_fn,
        )
    assert not changed(before, hydra)


@pytest.mark.parametrize("method", ["hydra-ppo", "j-hydra-ppo", "ppo"])
def test_a_gradient_that_is_not_finite_changes_no_bit_and_is_counted(method: str) -> None:
    """NaN in one entry of one gradient of the actor: its optimizer skips the step, the critic's does not."""
    hydra = tiny_hydra(method)
    actor = {id(p) for group in hydra.trained_parameters("actor").values() for p in group.values()}
    target = next(p for name, p in hydra.named_parameters() if id(p) in actor and ("lora_B" in name or method == "ppo"))

    def poison(gradient: Tensor) -> Tensor:
        spoilt = gradient.clone()
        spoilt.view(-1)[0] = math.nan
        return spoilt

    handle = target.register_hook(poison)
    before = snapshot(hydra)
    (line,) = train(hydra, num_steps=1)
    moved = changed(before, hydra)
    assert line["optim/skipped_steps"] == 1
    assert math.isnan(line["optim/actor_grad_norm"])
    names = {name: id(parameter) for name, parameter in hydra.named_parameters()}
    assert not {name for name in moved if names[name] in actor}
    assert bool(moved) == (method != "j-hydra-ppo"), "one optimizer in j-hydra-ppo, an own one for the critic elsewhere"
    handle.remove()
    (line,) = train(hydra, num_steps=1)  # nothing of it is left: the next step is an ordinary one
    assert line["optim/skipped_steps"] == 0
    assert {name for name in changed(before, hydra) if names[name] in actor}


def test_a_loss_that_is_not_finite_skips_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of four PPO steps: counted from then on, and the run goes on."""
    # One call per micro-batch; with this budget a minibatch of eight is one.
    monkeypatch.setattr(ppo_update, "ppo_value_loss", nan_from_call(ppo_update.ppo_value_loss, 2, 2))
    hydra = tiny_hydra("hydra-ppo")
    lines = train(hydra, num_steps=4, micro_batch_tokens=10_000)
    assert [line["optim/skipped_steps"] for line in lines] == [0, 1, 1, 1]
    assert math.isnan(lines[1]["loss/value"])
    assert all(math.isfinite(line["loss/value"]) for line in lines if line is not lines[1])
    assert all(tensor.isfinite().all() for tensor in snapshot(hydra).values())


def test_three_steps_in_a_row_end_ppo_with_the_parameters_of_the_last_good_one(monkeypatch: pytest.MonkeyPatch) -> None:
    straight = tiny_hydra("hydra-ppo")
    train(straight, num_steps=2, schedule="constant", micro_batch_tokens=10_000)
    monkeypatch.setattr(ppo_update, "ppo_policy_loss", nan_from_call(ppo_update.ppo_policy_loss, 3))
    hydra = tiny_hydra("hydra-ppo")
    session = Session()
    with pytest.raises(NonFiniteError, match=r"3 optimizer steps in a row of actor .*start a new run"):
        train(hydra, session, num_steps=9, schedule="constant", micro_batch_tokens=10_000)
    assert [line["step"] for line in session.history] == [1, 2, 3, 4]
    assert [line["optim/skipped_steps"] for line in session.history] == [0, 0, 1, 2]
    ours, theirs = (model.trunk("hydra").adapter_parameters("actor") for model in (hydra, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_scores_that_are_not_finite_do_not_poison_what_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rollout whose scores are NaN: both optimizers skip it, and neither the running moments nor the KL coefficient
    remember it."""
    collect = ppo_loop.collect_rollout
    calls = 0

    def collect_nan(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        rollout = collect(*args, **kwargs)
        return type(rollout)(
            **{name: getattr(rollout, name) for name in rollout.__dataclass_fields__}
            | ({"scores": rollout.scores * math.nan} if calls == 2 else {})
        )

    monkeypatch.setattr(ppo_loop, "collect_rollout", collect_nan)
    hydra = tiny_hydra("hydra-ppo")
    lines = train(hydra, num_steps=4, kl_target=1.0, kl_horizon=64, reward=RewardConfig(normalize=True))
    assert math.isnan(lines[1]["score/mean"])
    assert [line["optim/skipped_steps"] for line in lines] == [0, 2, 2, 2]
    assert all(math.isfinite(line["reward/mean"]) for line in lines if line is not lines[1])
    assert all(math.isfinite(line["kl/coef"]) for line in lines)


def test_three_steps_in_a_row_end_stage_1(monkeypatch: pytest.MonkeyPatch) -> None:
    hydra = tiny_hydra("hydra-ppo")
    weight = hydra.trunk("hydra").decoder.get_parameter("layers.0.mlp.up_proj.linear.weight")
    seen: list[dict[str, Tensor]] = []

    def poison(gradient: Tensor) -> Tensor:
        seen.append(snapshot(hydra))
        return gradient * math.nan

    weight.requires_grad_(True)
    weight.register_hook(poison)
    with pytest.raises(NonFiniteError, match=r"hydra_sft: 3 steps in a row .*hydra_sft\.learning_rate"):
        train_hydra_sft(hydra, PAIRS, HydraSFTConfig(batch_size=2, num_epochs=2.0), data=NO_TEMPLATE)
    assert len(seen) == 3
    assert not changed(seen[0], hydra)
    assert all(
        value.isfinite().all()
        for value in (hydra.evaluate(ragged_batch(), ["reference"])["reference"].logprobs,)
        if value is not None
    )


def test_the_command_line_ends_with_1_and_an_intact_checkpoint_to_resume_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """NaN from the eighth of ten minibatches on; without it `--resume` ends where an undisturbed run ends."""
    monkeypatch.chdir(tmp_path)
    changes = {"ppo__num_steps": 5, "ppo__num_epochs": 1, "ppo__save_every": 3, "ppo__eval_every": 0}
    file = str(write_recipe(tmp_path / "recipe.yaml", **changes))
    assert exit_code("run", file) == 0
    expected = stable_lines(tmp_path / "runs" / "tiny")
    (tmp_path / "runs").rename(tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr(ppo_update, "ppo_policy_loss", nan_from_call(ppo_update.ppo_policy_loss, 8))
        capfd.readouterr()
        assert exit_code("run", file) == 1
    error = capfd.readouterr().err
    assert "NonFiniteError: 3 optimizer steps in a row" in error
    assert "start a new run" in error
    assert "Traceback" not in error
    run = tmp_path / "runs" / "tiny"
    # Two minibatches a step: the second of step 4 and both of step 5 are skipped; the checkpoint of step 3 is clean.
    assert [line["optim/skipped_steps"] for line in stable_lines(run) if line["stage"] == "ppo"] == [0, 0, 0, 1]
    store = CheckpointStore(run / "checkpoints" / "ppo", 2)
    found = store.latest_valid()
    assert found is not None
    assert (found.step, found.problems) == (3, ())
    assert all(tensor.isfinite().all() for tensors in found.tensors.values() for tensor in tensors.values())
    assert exit_code("run", file, "--resume") == 0
    assert stable_lines(run) == expected
