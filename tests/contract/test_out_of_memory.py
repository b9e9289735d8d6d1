"""Memory runs out somewhere in a step: it is finished in smaller parts, with the same loss and the same gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from contract.test_methods import changed, rollout_of, stop_after, strip
from contract.tiny import METHODS, chat, ppo_config, prompts, randomise_adapters, snapshot, tiny_hydra
from hydra_rlhf.config import HydraSFTConfig, LoraConfig, Recipe
from hydra_rlhf.data.formats import TokenizedPair
from hydra_rlhf.errors import OutOfMemoryError
from hydra_rlhf.evaluation.preferences import evaluate_preferences
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.runtime.optimizer import Optimizer
from hydra_rlhf.runtime.run import Run
from hydra_rlhf.stages import hydra_sft
from hydra_rlhf.stages.limits import StageLimits
from hydra_rlhf.stages.micro_batches import micro_batches
from hydra_rlhf.stages.ppo import judge, train_ppo_stage
from hydra_rlhf.stages.ppo_state import build_optimizers
from hydra_rlhf.stages.ppo_update import update
from hydra_rlhf.stages.rollout import score_roles
from hydra_rlhf.stages.session import Session
from hydra_rlhf.stages.supervised import train_supervised

ENOMEM = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


def run_out(hydra: HydraModel, wanted: Callable[[set[str], int], str | None]) -> list[int]:
    """Let memory run out where `wanted(roles, call number)` says `forward` or `backward`; returns rows of each call."""
    evaluate = hydra.evaluate
    rows: list[int] = []

    def failing(batch, roles, **arguments: Any):
        roles = list(roles)
        where = wanted(set(roles), len(rows))
        rows.append(len(batch.tokens))
        outputs = evaluate(batch, roles, **arguments)
        if where == "forward":
            raise torch.OutOfMemoryError(ENOMEM)
        if where == "backward":
            for output in outputs.values():
                for tensor in (output.logprobs, output.values, output.scores):
                    if tensor is not None and tensor.requires_grad:
                        tensor.register_hook(no_memory)
        return outputs

    hydra.evaluate = failing  # pyright: ignore[reportAttributeAccessIssue]
    return rows


def no_memory(_: Tensor) -> None:
    """A hook that fails in the middle of a backward."""
    raise torch.OutOfMemoryError(ENOMEM)


def wide_hydra(method: str, dtype: torch.dtype) -> HydraModel:
    """A model in one dtype throughout, LoRA sets and heads included."""
    hydra = tiny_hydra(method, "llama", dtype)
    randomise_adapters(hydra)
    for parameter in hydra.parameters():
        parameter.data = parameter.data.to(dtype)
    return hydra


def one_update(
    method: str, dtype: torch.dtype, wanted: Callable[[set[str], int], str | None], **changes: Any
) -> tuple[dict[str, Tensor], dict[str, float], StageLimits, list[int]]:
    """(gradients as the optimizers get them, metrics, limits, rows of each forward) of one minibatch of eight."""
    hydra = wide_hydra(method, dtype)
    config = ppo_config(num_epochs=1, minibatch_size=8, micro_batch_tokens=10_000, **changes)
    rollout = rollout_of(hydra, config)
    targets = judge(rollout, config, kl_coef=0.1, scale=1.0)
    optimizers = build_optimizers(hydra, config)
    names = {id(p): name for name, p in hydra.named_parameters()}
    caught: dict[str, Tensor] = {}
    for optimizer in optimizers.values():

        def catch(groups=None, optimizer=optimizer):
            held = {names[id(p)]: p.grad for p in optimizer._params.values() if p.grad is not None}
            assert not held.keys() & caught.keys(), "an optimizer stepped twice"
            caught.update({name: grad.clone() for name, grad in held.items()})
            return Optimizer.step(optimizer, groups)

        optimizer.step = catch  # pyright: ignore[reportAttributeAccessIssue]
    rows = run_out(hydra, wanted)
    limits = StageLimits.of(config)
    metrics = update(hydra, optimizers, rollout, targets, config, step=0, seed=0, limits=limits)
    return caught, metrics, limits, rows


def never(roles: set[str], call: int) -> None:
    """Memory suffices."""
    return


class At:
    """Memory runs out at these forwards of a pass that has `role` in it, counted from 0."""

    def __init__(self, role: str, where: str, *calls: int) -> None:
        self.role, self.where, self.calls, self.count = role, where, calls, 0

    def __call__(self, roles: set[str], call: int) -> str | None:
        if self.role not in roles:
            return None
        self.count += 1
        return self.where if self.count - 1 in self.calls else None


@pytest.mark.parametrize("role", ["actor", "critic"])
@pytest.mark.parametrize(
    ("where", "dtype"), [("forward", torch.float64), ("backward", torch.float64), ("backward", torch.float32)]
)
def test_a_redone_pass_leaves_the_same_gradients(method: str, role: str, where: str, dtype: torch.dtype):
    expected, metrics, _, rows = one_update(method, dtype, never)
    found, metrics_found, limits, rows_found = one_update(method, dtype, At(role, where, 0))
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        atol = 1e-10 if dtype == torch.float64 else 1e-5 * grad.abs().max().item()
        assert_close(found[name], grad, atol=atol, rtol=0)
    for key, value in metrics.items():
        assert metrics_found[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    # All eight rows in one forward without trouble; the pass that failed is done again in two or more.
    assert set(rows) == {8}
    assert limits.num_retries == 1
    assert rows_found.count(8) == (2 if method != "j-hydra-ppo" and role == "critic" else 1)
    assert sum(rows_found) == sum(rows) + 8


@pytest.mark.parametrize("places", [{"actor": (0, 2)}, {"actor": (0,), "critic": (0,)}], ids=["twice", "both"])
def test_memory_may_run_out_more_than_once(method: str, places: dict[str, tuple[int, ...]]):
    """In the first forward of a pass and in the second of its repetition; in the actor's pass and in the critic's."""
    expected, _, _, _ = one_update(method, torch.float64, never)
    failing = [At(role, "backward", *calls) for role, calls in places.items()]

    def wanted(roles: set[str], call: int) -> str | None:
        found = [at(roles, call) for at in failing]
        return next((where for where in found if where is not None), None)

    found, _, limits, _ = one_update(method, torch.float64, wanted)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert_close(found[name], grad, atol=1e-10, rtol=0)
    joined = method == "j-hydra-ppo" and "critic" in places
    assert limits.num_retries == (1 if joined else 2)


def test_a_smaller_limit_is_kept(method: str):
    """After one failure no later pass or minibatch tries the old size again."""
    hydra = tiny_hydra(method)
    config = ppo_config(num_epochs=2, minibatch_size=8, micro_batch_tokens=10_000)
    rollout = rollout_of(hydra, config)
    targets = judge(rollout, config, kl_coef=0.1, scale=1.0)
    rows = run_out(hydra, At("actor", "forward", 0))
    limits = StageLimits.of(config)
    update(hydra, build_optimizers(hydra, config), rollout, targets, config, step=0, seed=0, limits=limits)
    assert rows[0] == 8
    assert len(rows) > 4
    assert all(row < 8 for row in rows[1:])
    assert limits.num_retries == 1


def test_a_single_sequence_that_does_not_fit_ends_the_update():
    with pytest.raises(OutOfMemoryError, match=r"memory\.checkpointing=layers"):
        one_update("hydra-ppo", torch.float32, lambda *_: "forward")


def test_scoring_is_done_again_as_a_smaller_limit_would_have(method: str):
    """Bit for bit, so that the update that follows, cut alike, begins with ratios of exactly one."""
    hydra = tiny_hydra(method)
    randomise_adapters(hydra)
    config = ppo_config(num_epochs=1, minibatch_size=8, micro_batch_tokens=40)
    rollout = rollout_of(hydra, config)
    limits = StageLimits(micro_batch_tokens=40)
    assert sum(1 for _ in micro_batches(rollout.batch, 40)) > 1
    plain = hydra.evaluate
    run_out(hydra, lambda _, call: "forward" if call == 1 else None)
    scored = score_roles(hydra, rollout.batch, hydra.table, temperature=1.0, limits=limits)
    assert limits.num_retries == 1
    assert limits.micro_batch_tokens <= 20
    hydra.evaluate = plain  # pyright: ignore[reportAttributeAccessIssue]
    small = StageLimits(micro_batch_tokens=limits.micro_batch_tokens)
    expected = score_roles(hydra, rollout.batch, hydra.table, temperature=1.0, limits=small)
    for field in ("logprobs", "entropy", "ref_logprobs", "values", "scores"):
        assert torch.equal(getattr(scored, field), getattr(expected, field)), field


# --- stage 1 --------------------------------------------------------------------------------------------------------


def pairs() -> list[TokenizedPair]:
    """Twelve pairs of different lengths."""
    generator = torch.Generator().manual_seed(2)

    def ids(n: int) -> list[int]:
        return torch.randint(3, 300, (n,), generator=generator).tolist()

    return [TokenizedPair([1, *ids(1 + i % 4)], [*ids(2 + i % 5), 2], [*ids(1 + i % 3), 2]) for i in range(12)]


def train(config: HydraSFTConfig, wanted: Callable[[set[str], int], str | None], dtype: torch.dtype = torch.float64):
    """(weights after stage 1, its log) of the hydra decoder."""
    hydra = wide_hydra("hydra-ppo", dtype)
    run_out(hydra, wanted)
    session = Session()
    loss = hydra_sft.with_coef(0.5)
    lora = LoraConfig(rank=2)
    train_supervised(
        session, hydra, pairs(), config, stage="hydra_sft", loss=loss, lora=lora, seed=1, held_out=pairs()[:5]
    )
    return snapshot(hydra), session.history


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_stage_1_survives_and_learns_the_same(tuning: str, where: str, monkeypatch: pytest.MonkeyPatch):
    """Two steps in float64; memory runs out on the whole batch of six pairs, and again on the first of its halves."""
    monkeypatch.setattr("hydra_rlhf.model.hydra.DTYPES", {"float32": torch.float64})
    config = HydraSFTConfig(
        tuning=tuning,  # pyright: ignore[reportArgumentType]
        batch_size=6,
        num_epochs=1.0,
        micro_batch_tokens=400,
        learning_rate=1e-3,
        eval_every=1,
    )
    expected, history = train(config, never)
    found, seen = train(config, lambda _, call: where if call in (0, 1) else None)
    for name, tensor in expected.items():
        assert_close(found[name], tensor, atol=1e-9, rtol=0, msg=name)
    assert [line["memory/retries"] for line in history] == [0, 0]
    assert [line["memory/retries"] for line in seen] == [2, 2]
    assert seen[0]["memory/micro_batch_tokens"] < history[0]["memory/micro_batch_tokens"] == 400
    for line, other in zip(history, seen, strict=True):
        for key in ("loss/total", "optim/grad_norm", "eval/perplexity", "eval/margin"):
            assert other[key] == pytest.approx(line[key], rel=1e-9), key


def test_an_evaluation_survives():
    hydra = wide_hydra("hydra-ppo", torch.float64)
    roles = ["reference", "reward"]
    expected = evaluate_preferences(hydra, pairs(), roles, limits=StageLimits(micro_batch_tokens=60))
    run_out(hydra, lambda _, call: "forward" if call == 2 else None)
    limits = StageLimits(micro_batch_tokens=60)
    found = evaluate_preferences(hydra, pairs(), roles, limits=limits)
    assert limits.num_retries == 1
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-9), key


# --- resume ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ppo", "hydra-ppo"])
def test_a_resumed_run_is_cut_as_the_interrupted_one_was(method: str, tmp_path):
    """Memory runs out in step 1 alone; a run killed after it and resumed goes on in small parts, bit for bit."""
    config = ppo_config(num_steps=3, save_every=1, micro_batch_tokens=200)

    def run(name: str, *, killed: bool):
        recipe = Recipe(name=name, output_dir=str(tmp_path), ppo=config)
        for life in range(1 + killed):
            hydra = tiny_hydra(method)
            if life == 0:
                run_out(hydra, At("actor", "forward", 1))
            with Run.open(recipe, resume=life > 0) as opened:
                session = Session(opened)
                if killed and life == 0:
                    session.save = stop_after(session, 1)  # pyright: ignore[reportAttributeAccessIssue]
                    with pytest.raises(KeyboardInterrupt):
                        train_ppo_stage(session, hydra, chat(hydra), prompts(), config, seed=3)
                else:
                    state = train_ppo_stage(session, hydra, chat(hydra), prompts(), config, seed=3)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return snapshot(hydra), state, [strip(line) for line in lines]  # pyright: ignore[reportPossiblyUnboundVariable]

    straight, state, lines = run("straight", killed=False)
    resumed, state_resumed, lines_resumed = run("resumed", killed=True)
    assert state.limits.num_retries == 1
    assert state.limits.micro_batch_tokens < 100
    assert state_resumed.limits == state.limits
    assert not changed(straight, resumed)
    assert lines == lines_resumed


def test_stage_1_resumes_with_its_limits(tmp_path):
    config = HydraSFTConfig(batch_size=6, num_epochs=1.5, micro_batch_tokens=90, save_every=1, eval_every=0)

    def run(name: str, *, killed: bool):
        recipe = Recipe(name=name, output_dir=str(tmp_path), hydra_sft=config)
        for life in range(1 + killed):
            hydra = tiny_hydra("hydra-ppo")
            if life == 0:
                run_out(hydra, lambda _, call: "backward" if call == 0 else None)
            with Run.open(recipe, resume=life > 0) as opened:
                session = Session(opened)
                if killed and life == 0:
                    session.save = stop_after(session, 1)  # pyright: ignore[reportAttributeAccessIssue]

                def go(session=session, hydra=hydra):
                    loss, lora = hydra_sft.with_coef(0.5), LoraConfig(rank=2)
                    train_supervised(session, hydra, pairs(), config, stage="hydra_sft", loss=loss, lora=lora, seed=1)

                if killed and life == 0:
                    with pytest.raises(KeyboardInterrupt):
                        go()
                else:
                    go()
        return snapshot(hydra), [line["memory/micro_batch_tokens"] for line in session.history]  # pyright: ignore

    straight, tokens = run("straight", killed=False)
    resumed, tokens_resumed = run("resumed", killed=True)
    assert tokens[0] < 45
    assert tokens == [tokens[0]] * 3
    assert tokens_resumed == tokens[1:]
    assert not changed(straight, resumed)
