"""What must hold for every method on every family: who shares weights, who learns, who never changes, exact resume."""

import pytest
import torch
from torch.testing import assert_close

from contract.tiny import (
    CONFIGS,
    METHODS,
    alone,
    chat,
    ppo_config,
    prompts,
    ragged_batch,
    randomise_adapters,
    snapshot,
    tiny_hydra,
)
from hydra_rlhf.config import Recipe, RewardConfig
from hydra_rlhf.memory.count import count_method
from hydra_rlhf.memory.measure import count_tensor_bytes
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.roles import ROLES, adapters, passes, trunks
from hydra_rlhf.runtime.run import Run
from hydra_rlhf.stages.finish import base_sizes
from hydra_rlhf.stages.limits import StageLimits
from hydra_rlhf.stages.ppo import judge, train_ppo_stage
from hydra_rlhf.stages.ppo_state import build_optimizers
from hydra_rlhf.stages.ppo_update import update
from hydra_rlhf.stages.rollout import collect_rollout, prompt_batch, sample_responses
from hydra_rlhf.stages.session import Session

FIVE_FAMILIES = ["llama", "opt", "gpt2", "qwen3", "gemma2", "mistral"]
TRUNK_PASSES = {"ppo": 4, "lora-ppo": 4, "d-lora-ppo": 4, "j-hydra-ppo": 2, "hydra-ppo": 3}  # paper.md, the ladder
STATIC_MODELS = {"ppo": 4, "lora-ppo": 4, "d-lora-ppo": 2, "j-hydra-ppo": 1, "hydra-ppo": 1}  # the paper's Table 2
LORA_SETS = {"ppo": 0, "lora-ppo": 2, "d-lora-ppo": 2, "j-hydra-ppo": 1, "hydra-ppo": 2}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=FIVE_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def rollout_of(hydra: HydraModel, config, step: int = 0, rows=range(6)):
    batch = prompt_batch(prompts(), [*rows, 0, 1], 1, 0, torch.device("cpu"))
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


def ppo_step(hydra: HydraModel, config, optimizers, step: int = 0) -> dict[str, float]:
    rollout = rollout_of(hydra, config, step)
    targets = judge(rollout, config, kl_coef=config.kl_coef, scale=1.0)
    return update(hydra, optimizers, rollout, targets, config, step=step, seed=0)


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_tables_are_the_papers_ladder(method: str):
    assert len(trunks(ROLES[method])) == STATIC_MODELS[method]
    assert len(adapters(ROLES[method])) == LORA_SETS[method]
    assert len(passes(ROLES[method])) == TRUNK_PASSES[method]


def test_trunk_passes_per_scored_batch_counted_by_hooks(method: str, family: str):
    hydra = tiny_hydra(method, family)
    calls = []
    for name in hydra.trunks:
        hydra.trunk(name).decoder.register_forward_hook(lambda *_: calls.append(1))
    hydra.evaluate(ragged_batch(), hydra.table)
    assert len(calls) == TRUNK_PASSES[method]


def test_static_models_are_counted_in_bytes_of_disjoint_storage(method: str):
    hydra = tiny_hydra(method, "llama")
    one = count_tensor_bytes(tiny_hydra("hydra-ppo", "llama").trunk("hydra").base_parameters().values())
    head = hydra.trunk(next(iter(hydra.trunks))).lm_head.weight
    without_lm = sum(
        not any(role.trunk == name and role.head == "lm" for role in hydra.table.values()) for name in hydra.trunks
    )
    held = count_tensor_bytes(p for name in hydra.trunks for p in hydra.trunk(name).base_parameters().values())
    assert held == STATIC_MODELS[method] * one - without_lm * head.numel() * 4


def test_counted_bytes_equal_held_bytes(method: str, family: str):
    """The table's arithmetic against the storages that are really there, optimizer included."""
    hydra = tiny_hydra(method, family)
    counted = count_method(hydra.table, base_sizes(hydra))
    trunk_bytes = count_tensor_bytes(p for n in hydra.trunks for p in hydra.trunk(n).base_parameters().values())
    lora_bytes = count_tensor_bytes(
        p
        for adapter, trunk in adapters(hydra.table).items()
        for p in hydra.trunk(trunk).adapter_parameters(adapter).values()
    )
    assert counted.trunks == trunk_bytes
    assert counted.adapters == lora_bytes
    assert counted.heads == count_tensor_bytes(hydra.scalar_heads.parameters())
    state = [
        tensor
        for optimizer in build_optimizers(hydra, ppo_config()).values()
        for name, tensor in optimizer.state().items()
        if "/" in name  # the three counters apart
    ]
    assert counted.optimizer == count_tensor_bytes(state)


def test_before_the_first_step_ratios_are_one(method: str, family: str):
    """Exactly with the micro-batches that scored, within 1e-5 with others; so are old and new values."""
    hydra = tiny_hydra(method, family)
    randomise_adapters(hydra)
    config = ppo_config(num_epochs=1, minibatch_size=8)
    rollout = rollout_of(hydra, config)
    targets = judge(rollout, config, kl_coef=0.0, scale=1.0)
    frozen = ppo_config(
        num_epochs=1,
        minibatch_size=8,
        actor_learning_rate=1e-30,
        critic_learning_rate=1e-30,
        value_head_learning_rate=1e-30,
    )
    for budget, tolerance in ((config.micro_batch_tokens, 0.0), (8, 1e-5), (10_000, 1e-5)):
        probe = ppo_config(**{**vars_of(frozen), "micro_batch_tokens": budget})
        metrics = update(hydra, build_optimizers(hydra, probe), rollout, targets, probe, step=0, seed=0)
        assert abs(metrics["ppo/ratio_max"] - 1) <= tolerance
        assert abs(metrics["ppo/ratio_min"] - 1) <= tolerance
        assert metrics["ppo/value_clip_frac"] == 0


def vars_of(config) -> dict:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_only_declared_tensors_learn_and_each_of_them_does(method: str, family: str):
    """Two PPO steps: reference, reward and shared base stay bit-equal; every tensor the table declares moves."""
    hydra = tiny_hydra(method, family)
    before = snapshot(hydra)
    outputs_before = hydra.evaluate(ragged_batch(), ["reference", "reward"])
    config = ppo_config()
    optimizers = build_optimizers(hydra, config)
    for step in range(2):
        ppo_step(hydra, config, optimizers, step)
    moved = changed(before, snapshot(hydra))
    declared = {
        id(p) for role in ("actor", "critic") for g in hydra.trained_parameters(role).values() for p in g.values()
    }
    names = {name: id(parameter) for name, parameter in hydra.named_parameters()}
    assert moved <= {name for name, key in names.items() if key in declared}
    adapter_tensors = {name for name in names if ".lora_" in name}
    assert adapter_tensors <= moved, f"did not learn: {sorted(adapter_tensors - moved)[:3]}"
    assert any(name.endswith("value.weight") or "/value" in name for name in moved)
    if not adapter_tensors:
        assert {name.split(".")[1] for name in moved if name.startswith("trunks.")} == {"actor", "critic"}
    outputs_after = hydra.evaluate(ragged_batch(), ["reference", "reward"])
    assert torch.equal(outputs_after["reference"].logprobs, outputs_before["reference"].logprobs)
    assert torch.equal(outputs_after["reward"].scores, outputs_before["reward"].scores)


def test_an_actor_step_leaves_the_critic_alone_and_the_reverse(method: str):
    hydra = tiny_hydra(method)
    randomise_adapters(hydra)
    config = ppo_config(critic_warmup_steps=1)
    optimizers = build_optimizers(hydra, config)
    before = snapshot(hydra)
    actor_names = {id(p) for g in hydra.trained_parameters("actor").values() for p in g.values()}
    names = {name: id(parameter) for name, parameter in hydra.named_parameters()}
    ppo_step(hydra, config, optimizers, step=0)  # warm-up: the critic alone learns
    moved = changed(before, snapshot(hydra))
    assert moved
    assert not any(names[name] in actor_names for name in moved)
    if method == "j-hydra-ppo":
        assert moved == {"scalar_heads.hydra/value.weight", "scalar_heads.hydra/value.bias"}
    # With the critic's rates at nothing, an actor step moves actor tensors only.
    config = ppo_config(critic_learning_rate=1e-30, value_head_learning_rate=1e-30)
    before = snapshot(hydra)
    ppo_step(hydra, config, build_optimizers(hydra, config), step=1)
    moved = changed(before, snapshot(hydra))
    assert moved
    assert all(names[name] in actor_names for name in moved)


def test_the_critic_starts_as_the_reward_model(method: str, family: str):
    hydra = tiny_hydra(method, family)
    batch = ragged_batch()
    # The value before token t is read where a response ending at token t - 1 would be scored.
    values = hydra.evaluate(batch, ["critic"])["critic"].values
    for row in range(4):
        r = int(batch.response_mask[row].sum())
        if r > 1:
            one = alone(batch, row)
            shorter = type(one)(
                tokens=one.tokens[:, :-1],
                attention_mask=one.attention_mask[:, :-1],
                response_mask=one.response_mask[:, :-1],
            )
            score = hydra.evaluate(shorter, ["reward"])["reward"].scores
            assert_close(values[row, r - 1], score[0], atol=2e-5, rtol=1e-5)


def gradients(hydra: HydraModel, config, rollout, targets) -> dict[str, torch.Tensor]:
    """Every role's gradient of one minibatch, caught where the optimizer would take it."""
    caught: dict[str, torch.Tensor] = {}
    optimizers = build_optimizers(hydra, config)
    names = {id(p): name for name, p in hydra.named_parameters()}
    for optimizer in optimizers.values():

        def catch(groups=None, optimizer=optimizer):
            for parameter in optimizer._params.values():
                if parameter.grad is not None:
                    caught[names[id(parameter)]] = parameter.grad.clone()
            return type(optimizer).skip(optimizer)

        optimizer.step = catch  # pyright: ignore[reportAttributeAccessIssue]
    update(hydra, optimizers, rollout, targets, config, step=0, seed=0)
    return caught


@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_padding_and_checkpointing_do_not_change_gradients(method: str, checkpointing: bool):
    """float64: 1e-10 between one micro-batch and many, with and without recomputation."""
    reference = None
    for budget in (10_000, 24, 1):
        hydra = tiny_hydra(method, "llama", torch.float64)
        randomise_adapters(hydra)
        for parameter in hydra.parameters():  # LoRA sets and heads in float64 as well
            parameter.data = parameter.data.double()
        if checkpointing:
            for name in hydra.trunks:
                hydra.trunk(name).enable_checkpointing()
        config = ppo_config(num_epochs=1, minibatch_size=8, micro_batch_tokens=24)
        rollout = rollout_of(hydra, config)
        targets = judge(rollout, config, kl_coef=0.1, scale=1.0)
        found = gradients(
            hydra, ppo_config(num_epochs=1, minibatch_size=8, micro_batch_tokens=budget), rollout, targets
        )
        if reference is None:
            reference = found
        assert found.keys() == reference.keys()
        for name, grad in found.items():
            assert_close(grad, reference[name], atol=1e-10, rtol=0)


def test_lora_ppo_and_d_lora_ppo_have_equal_losses(family: str):
    """The same mathematics on four trunks and on two: five steps, every logged loss within 1e-6."""
    histories = []
    for method in ("lora-ppo", "d-lora-ppo"):
        hydra = tiny_hydra(method, family)
        config = ppo_config(num_steps=5)
        session = Session()
        train_ppo_stage(session, hydra, chat(hydra), prompts(), config, seed=3)
        histories.append(session.history)
    assert len(histories[0]) == 5
    for four, two in zip(*histories, strict=True):
        for key in ("loss/policy", "loss/value", "score/mean", "kl/reference", "optim/actor_grad_norm"):
            assert abs(four[key] - two[key]) <= 1e-6, key
    assert any(abs(line["kl/reference"]) > 1e-3 for line in histories[0]), "the actor should have moved"


def test_save_load_and_the_next_steps_are_bit_equal(method: str, tmp_path):
    """Three steps at a stretch, and the same three with a fresh process's objects after every step."""
    config = ppo_config(num_steps=3, save_every=1, kl_target=1.0, kl_horizon=64, reward=RewardConfig(normalize=True))

    def run(name: str, steps_per_life: int):
        recipe = Recipe(name=name, output_dir=str(tmp_path), ppo=config)
        states = []
        for life in range(3 // steps_per_life):
            hydra = tiny_hydra(method)
            with Run.open(recipe, resume=life > 0) as opened:
                session = Session(opened)
                if steps_per_life == 1 and life < 2:
                    session.save = stop_after(session, life + 1)  # pyright: ignore[reportAttributeAccessIssue]
                    with pytest.raises(KeyboardInterrupt):
                        train_ppo_stage(session, hydra, chat(hydra), prompts(), config, seed=3)
                else:
                    train_ppo_stage(session, hydra, chat(hydra), prompts(), config, seed=3)
                    states.append(snapshot(hydra))
        return states[-1], [strip(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    straight, straight_lines = run("straight", 3)
    resumed, resumed_lines = run("resumed", 1)
    assert not changed(straight, resumed)
    assert straight_lines == resumed_lines
    assert len(straight_lines) == 3


def stop_after(session: Session, step: int):
    """Save, and die right after the save of `step`."""
    save = type(session).save

    def stopping(stage, at, *args, **kwargs):
        save(session, stage, at, *args, **kwargs)
        if at == step:
            raise KeyboardInterrupt

    return stopping


def strip(line: str) -> dict:
    import json

    keep = json.loads(line)
    return {k: v for k, v in keep.items() if not k.startswith(("time/", "memory/")) and not k.endswith("_per_s")}


def test_five_families_or_more_are_held_to_this():
    assert len(set(FIVE_FAMILIES) & set(CONFIGS)) >= 5
