"""The promises of the contract tests on an NVIDIA GPU: float32 with TF32 off, and bfloat16 within stated bounds.

python -m pytest tests/gpu                                   on a machine with CUDA
HYDRA_RLHF_GPU_TESTS_ON=cpu python -m pytest tests/gpu       the same code elsewhere, to see that the tests are right
"""

import os
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from contract.tiny import (
    METHODS,
    alone,
    chat,
    ppo_config,
    prompts,
    ragged_batch,
    randomise_adapters,
    snapshot,
    tiny_hydra,
    tiny_trunk,
    with_garbage_padding,
)
from smoke.tiny_runs import keys_of, metric_lines, recipe
from test_code_shape import documented_metrics
from torch import Tensor

from hydra_rlhf.config import PPOConfig, SamplingConfig
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.sample import sample_tokens
from hydra_rlhf.records import PPOTargets, Rollout, TokenBatch
from hydra_rlhf.reporting.render import render_report
from hydra_rlhf.runtime.optimizer import Optimizer
from hydra_rlhf.stages.limits import StageLimits
from hydra_rlhf.stages.pipeline import run_recipe
from hydra_rlhf.stages.ppo import judge
from hydra_rlhf.stages.ppo_state import build_optimizers
from hydra_rlhf.stages.ppo_update import update
from hydra_rlhf.stages.rollout import collect_rollout, prompt_batch, sample_responses

DEVICE = os.environ.get("HYDRA_RLHF_GPU_TESTS_ON", "cuda")
FAMILIES = ["llama", "opt", "gpt2", "qwen3", "gemma2"]
ROLE_NAMES = ["actor", "critic", "reference", "reward"]

FP32_BOUND = 1e-4
"""Of ratios around 1, and of losses and gradients relative to their largest entry."""
BF16_RATIO_BOUND = 0.1
"""Of ratios around 1 with other micro-batches. A bfloat16 keeps 8 bits: one rounding is up to 2**-8 = 0.004 relative,
and a log-prob of a two-layer model has some ten of them behind it. To be confirmed by measurement on a GPU."""
BF16_GRADIENT_BOUND = 0.1
"""Of gradients relative to their largest entry, likewise, and likewise to be confirmed."""
BOUNDS = {torch.float32: (FP32_BOUND, FP32_BOUND), torch.bfloat16: (BF16_RATIO_BOUND, BF16_GRADIENT_BOUND)}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """TF32 off and deterministic kernels, as a run has them."""
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True)
    yield
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(deterministic)


def build(method: str, family: str, dtype: torch.dtype = torch.float32) -> HydraModel:
    """A tiny model of a method on the device, with LoRA sets that have an effect."""
    hydra = tiny_hydra(method, family, dtype)
    randomise_adapters(hydra, 0.1)
    return hydra.to(DEVICE)


def on_device(batch: TokenBatch) -> TokenBatch:
    """The same batch on the device."""
    return TokenBatch(**{field.name: getattr(batch, field.name).to(DEVICE) for field in fields(batch)})


def rollout_of(hydra: HydraModel, config: PPOConfig, step: int = 0) -> Rollout:
    """Eight responses to six prompts, looked at by every role."""
    batch = prompt_batch(prompts(), [*range(6), 0, 1], 1, 0, hydra.device)
    assert batch.tokens.device.type == DEVICE
    limits = StageLimits.of(config)
    responses = sample_responses(hydra, chat(hydra), "actor", batch, config.sampling, stream=(0, step), limits=limits)
    return collect_rollout(
        hydra,
        batch,
        responses,
        config.reward,
        temperature=config.sampling.temperature,
        limits=limits,
        reward_fn=None,
    )


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that differ in any bit."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def outputs(hydra: HydraModel, batch: TokenBatch) -> dict[str, Tensor]:
    """What every role says about a batch, without a graph."""
    with torch.no_grad():
        found = hydra.evaluate(batch, ROLE_NAMES)
    said = {
        "actor": found["actor"].logprobs,
        "critic": found["critic"].values,
        "reference": found["reference"].logprobs,
        "reward": found["reward"].scores,
    }
    return {role: value for role, value in said.items() if value is not None}


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of any entry, relative to the largest entry there is."""
    assert ours.keys() == theirs.keys()
    assert ours
    largest = max(value.abs().max().item() for value in theirs.values())
    assert largest > 0
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours) / largest


def catch_gradients(
    hydra: HydraModel, config: PPOConfig, rollout: Rollout, targets: PPOTargets, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Tensor]:
    """Every gradient of one minibatch, caught where the optimizer would take it."""
    caught: dict[str, Tensor] = {}
    names = {id(parameter): name for name, parameter in hydra.named_parameters()}

    def catch(optimizer: Optimizer, groups: object = None) -> object:
        for parameter in optimizer._params.values():
            if parameter.grad is not None:
                caught[names[id(parameter)]] = parameter.grad.float().clone()
        return optimizer.skip()

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", catch)
        update(hydra, build_optimizers(hydra, config), rollout, targets, config, step=0, seed=0)
    return caught


# --- the device says what the CPU says ------------------------------------------------------------------------------


def test_roles_say_what_they_say_on_the_cpu(method: str, family: str) -> None:
    expected = tiny_hydra(method, family)
    randomise_adapters(expected, 0.1)
    there = outputs(expected, ragged_batch())
    here = {role: value.cpu() for role, value in outputs(build(method, family), on_device(ragged_batch())).items()}
    assert worst(here, there) <= FP32_BOUND


def test_greedy_decoding_equals_generate(family: str) -> None:
    """Token by token, on a batch with left padding; float64 but for Gemma 2, whose attention cannot."""
    trunk = tiny_trunk(family, torch.float32 if family == "gemma2" else torch.float64).to(DEVICE)
    batch = on_device(ragged_batch())
    ids, mask = batch.tokens[:, :5], batch.attention_mask[:, :5]
    ours = sample_tokens(
        trunk,
        None,
        ids,
        mask,
        torch.full((4, 12), 0.5, device=DEVICE),
        SamplingConfig(top_k=1, max_response_tokens=12),
        stop_ids=(2,),
        pad_id=0,
    )
    theirs = trunk.model.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=0,
    )[:, ids.shape[1] :]
    for row in range(4):
        n = int(ours.mask[row].sum())
        assert n >= 1
        assert ours.tokens[row, :n].tolist() == theirs[row, :n].tolist()


def test_a_response_does_not_depend_on_what_shares_its_batch(family: str) -> None:
    """Sampled with stop tokens that end rows at different times, with top-k and top-p; alone, and with others."""
    trunk = tiny_trunk(family, torch.float32 if family == "gemma2" else torch.float64).to(DEVICE)
    batch = on_device(ragged_batch())
    ids, mask = batch.tokens[:, :5], batch.attention_mask[:, :5]
    uniforms = torch.rand(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)

    def sample(rows: list[int], **limits: float) -> tuple[Tensor, Tensor]:
        sampling = SamplingConfig(max_response_tokens=8, **limits)  # pyright: ignore[reportArgumentType]
        stops = tuple(range(2, 80))
        drawn = sample_tokens(trunk, None, ids[rows], mask[rows], uniforms[rows], sampling, stop_ids=stops, pad_id=0)
        return drawn.tokens, drawn.mask

    for limits in ({}, {"top_k": 20}, {"top_p": 0.9}):
        tokens, kept = sample([0, 1, 2, 3], **limits)
        for row in range(4):
            n = int(kept[row].sum())
            single, _ = sample([row], **limits)
            assert single[0].tolist() == tokens[row, :n].tolist()


# --- invariant 1 and 2: who shares weights, who learns ---------------------------------------------------------------


def test_lora_off_is_the_stage_1_model_bit_for_bit_and_stays_it(method: str, family: str, dtype: torch.dtype) -> None:
    """Two PPO steps: reference and reward say the same bits; only declared tensors move, and each of them does."""
    batch = on_device(ragged_batch())
    plain = tiny_trunk(family, dtype).to(DEVICE)
    hydra = build(method, family, dtype)
    with torch.no_grad():
        hidden = plain.hidden_states(batch.tokens, batch.attention_mask, adapter=None)
        trunk = hydra.trunk(hydra.table["reference"].trunk)
        assert torch.equal(trunk.hidden_states(batch.tokens, batch.attention_mask, adapter=None), hidden)
    before, said = snapshot(hydra), outputs(hydra, batch)
    config = ppo_config()
    optimizers = build_optimizers(hydra, config)
    for step in range(2):
        rollout = rollout_of(hydra, config, step)
        targets = judge(rollout, config, kl_coef=config.kl_coef, scale=1.0)
        metrics = update(hydra, optimizers, rollout, targets, config, step=step, seed=0)
        assert metrics["optim/skipped_steps"] == 0
    moved = changed(before, snapshot(hydra))
    trained = {
        id(parameter)
        for role in ("actor", "critic")
        for group in hydra.trained_parameters(role).values()
        for parameter in group.values()
    }
    declared = {name for name, parameter in hydra.named_parameters() if id(parameter) in trained}
    assert moved <= declared
    assert {name for name in declared if ".lora_" in name or "value.weight" in name} <= moved
    if not any(".lora_" in name for name in declared):
        assert {name.split(".")[1] for name in moved if name.startswith("trunks.")} == {"actor", "critic"}
    after = outputs(hydra, batch)
    for role in ("reference", "reward"):
        assert torch.equal(after[role], said[role]), role
    assert not torch.equal(after["actor"], said["actor"])


def test_the_critic_alone_learns_in_its_warm_up(method: str) -> None:
    hydra = build(method, "llama")
    config = ppo_config(critic_warmup_steps=1)
    actor = {id(p) for group in hydra.trained_parameters("actor").values() for p in group.values()}
    names = {name: id(parameter) for name, parameter in hydra.named_parameters()}
    before = snapshot(hydra)
    rollout = rollout_of(hydra, config)
    targets = judge(rollout, config, kl_coef=config.kl_coef, scale=1.0)
    update(hydra, build_optimizers(hydra, config), rollout, targets, config, step=0, seed=0)
    moved = changed(before, snapshot(hydra))
    assert moved
    assert not {name for name in moved if names[name] in actor}


# --- invariant 3: recomputation --------------------------------------------------------------------------------------


def test_gradients_do_not_depend_on_checkpointing_or_on_when_backward_runs(family: str, dtype: torch.dtype) -> None:
    """Actor, critic and LoRA-off forwards first and both backwards later, with and without recomputation."""
    batch = on_device(ragged_batch())
    found: list[dict[str, Tensor]] = []
    for checkpointing, interleaved in ((False, False), (True, False), (False, True), (True, True)):
        hydra = build("hydra-ppo", family, dtype)
        if checkpointing:
            hydra.trunk("hydra").enable_checkpointing()
        hydra.train()

        def loss(role: str, hydra: HydraModel = hydra) -> Tensor:
            output = hydra.evaluate(batch, [role])[role]
            value = output.logprobs if role == "actor" else output.values
            assert value is not None
            return torch.where(batch.response_mask, value, 0.0).sum()

        if interleaved:
            actor, critic = loss("actor"), loss("critic")
            outputs(hydra, batch)
            critic.backward()
            actor.backward()
        else:
            loss("actor").backward()
            loss("critic").backward()
        found.append({name: p.grad.float() for name, p in hydra.named_parameters() if p.grad is not None})
    for role in ("actor", "critic"):
        grads = [{name: grad for name, grad in each.items() if f".{role}" in name} for each in found]
        for other in grads[1:]:
            assert worst(other, grads[0]) <= BOUNDS[dtype][1]


# --- invariant 4 and 5: ratios, micro-batches, padding ---------------------------------------------------------------


def test_before_the_first_step_ratios_are_one(method: str, family: str, dtype: torch.dtype) -> None:
    """With the micro-batches that scored and with others, within the bound of the dtype."""
    hydra = build(method, family, dtype)
    config = ppo_config(num_epochs=1, minibatch_size=8)
    rollout = rollout_of(hydra, config)
    targets = judge(rollout, config, kl_coef=0.0, scale=1.0)
    still = replace(config, actor_learning_rate=1e-30, critic_learning_rate=1e-30, value_head_learning_rate=1e-30)
    for budget in (config.micro_batch_tokens, 8, 10_000):
        probe = replace(still, micro_batch_tokens=budget)
        metrics = update(hydra, build_optimizers(hydra, probe), rollout, targets, probe, step=0, seed=0)
        assert abs(metrics["ppo/ratio_max"] - 1) <= BOUNDS[dtype][0], budget
        assert abs(metrics["ppo/ratio_min"] - 1) <= BOUNDS[dtype][0], budget


@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_do_not_change_gradients(
    method: str, family: str, dtype: torch.dtype, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hydra = build(method, family, dtype)
    if checkpointing:
        for name in hydra.trunks:
            hydra.trunk(name).enable_checkpointing()
    config = ppo_config(num_epochs=1, minibatch_size=8)
    rollout = rollout_of(hydra, config)
    targets = judge(rollout, config, kl_coef=0.1, scale=1.0)
    whole, single = (
        catch_gradients(hydra, replace(config, micro_batch_tokens=budget), rollout, targets, monkeypatch)
        for budget in (10_000, 1)
    )
    assert worst(single, whole) <= BOUNDS[dtype][1]


def test_padding_never_matters(family: str) -> None:
    hydra, batch = build("hydra-ppo", family), ragged_batch()
    padded = outputs(hydra, on_device(with_garbage_padding(batch)))
    for row in range(len(batch.tokens)):
        n = int(batch.response_mask[row].sum())
        single = outputs(hydra, on_device(alone(batch, row)))
        together = {
            role: value[row, :n][None] if value.dim() == 2 else value[row : row + 1] for role, value in padded.items()
        }
        assert worst(together, single) <= FP32_BOUND


# --- a whole run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_demo_at_smoke_size(precision: str, tmp_path: Path) -> None:
    """Every stage on the device, with the documented metrics; the loss of stage 1 falls."""
    folder = run_recipe(
        recipe(
            tmp_path,
            model__device=DEVICE,
            model__dtype=precision,
            memory__checkpointing="layers" if precision == "bfloat16" else "none",
            hydra_sft__num_epochs=2.0,
        )
    )
    keys = keys_of(folder)
    assert keys <= documented_metrics()
    cuda_keys = {key for key in documented_metrics() if key.startswith("memory/cuda_")}
    assert len(cuda_keys) == 3
    assert (cuda_keys & keys) == (cuda_keys if DEVICE == "cuda" else set())
    losses = [line["loss/total"] for line in metric_lines(folder) if line["stage"] == "hydra_sft"]
    assert losses[-1] < losses[0]
    assert all(line.get("optim/skipped_steps", 0) == 0 for line in metric_lines(folder))
    assert render_report(folder).is_file()


def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path) -> None:
    """Stopped after stage 1 and continued, in float32 with deterministic kernels: the same numbers."""
    straight = run_recipe(recipe(tmp_path, name="straight", model__device=DEVICE))
    halves = recipe(tmp_path, name="halves", model__device=DEVICE)
    run_recipe(halves, until="hydra_sft")
    resumed = run_recipe(halves, resume=True)
    for ours, theirs in zip(metric_lines(resumed), metric_lines(straight), strict=True):
        for key in ("loss/total", "score/mean", "loss/policy", "loss/value", "optim/actor_grad_norm"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=FP32_BOUND, abs=1e-6), key


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_steps_in_graphs_give_the_tokens_of_plain_steps(family: str) -> None:
    """More rows than slots, so that captured steps go on with other rows, other columns and shifted ones."""
    trunk = tiny_trunk(family, torch.float64).to(DEVICE)
    batch = on_device(ragged_batch())
    ids, mask = batch.tokens[:, :5], batch.attention_mask[:, :5]
    rows = torch.arange(24, device=DEVICE) % len(ids)
    uniforms = torch.rand(24, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)
    found = {
        engine: sample_tokens(
            trunk,
            None,
            ids[rows],
            mask[rows],
            uniforms,
            SamplingConfig(max_response_tokens=80, engine=engine),
            stop_ids=tuple(range(2, 8)),
            pad_id=0,
            num_rows=6,
        )
        for engine in ("slots", "graphs")
    }
    assert torch.equal(found["graphs"].tokens, found["slots"].tokens)
    assert torch.equal(found["graphs"].ended, found["slots"].ended)
