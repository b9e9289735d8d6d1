"""What must hold for methods that learn from pairs: nothing but the actor changes, LoRA off is the reference, exact
resume, micro-batches that show nowhere, and the memory that was planned."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig

from contract.tiny import (
    chat,
    ppo_config,
    prompts,
    ragged_batch,
    randomise_adapters,
    snapshot,
    tiny_hydra,
    tokenizer,
)
from hydra_rlhf.config import LoraConfig, ModelConfig, PreferenceConfig, Recipe
from hydra_rlhf.data.formats import TokenizedPair
from hydra_rlhf.memory.count import count_method
from hydra_rlhf.memory.measure import count_tensor_bytes
from hydra_rlhf.memory.plan import Cuts, Planner, Workload, total
from hydra_rlhf.memory.simulate import Simulation
from hydra_rlhf.memory.sizes import sizes_of
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.load import DTYPES, attention_implementation, to_dtype
from hydra_rlhf.model.logprobs import LOGIT_TILE_BYTES
from hydra_rlhf.model.roles import PAIR_READERS, ROLES, methods_with
from hydra_rlhf.model.shapes import meta_trunk
from hydra_rlhf.model.trunk import Trunk
from hydra_rlhf.runtime.measure import PhaseMemory
from hydra_rlhf.runtime.run import Run
from hydra_rlhf.runtime.tensor_bytes import TensorBytes
from hydra_rlhf.stages.examples import token_micro_batches
from hydra_rlhf.stages.finish import base_sizes
from hydra_rlhf.stages.held_out import HeldOut
from hydra_rlhf.stages.limits import StageLimits
from hydra_rlhf.stages.preference import look, preference_loss, train_preference_stage
from hydra_rlhf.stages.session import Session
from hydra_rlhf.stages.supervised import Task, add_gradients, build_optimizer, trained_parameters

FAMILIES = ["llama", "opt", "gpt2", "qwen3", "gemma2", "mistral"]
TRUNK_PASSES = {"dpo": 2, "simpo": 1}


@pytest.fixture(params=methods_with("preference"))
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def pairs(num: int = 8, prompt: int = 0, response: int = 0) -> list[TokenizedPair]:
    """Pairs of different lengths, or all of the given ones."""
    generator = torch.Generator().manual_seed(2)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 300, (length,), generator=generator).tolist()

    if prompt:
        return [TokenizedPair(ids(prompt), ids(response), ids(response)) for _ in range(num)]
    return [TokenizedPair([1, *ids(1 + i % 4)], [*ids(2 + i % 5), 2], [*ids(1 + i % 3), 2]) for i in range(num)]


def config(**changes: object) -> PreferenceConfig:
    """Three steps of four pairs, in micro-batches of some."""
    settings: dict[str, object] = {
        "batch_size": 4,
        "num_epochs": 1.5,
        "micro_batch_tokens": 48,
        "learning_rate": 1e-2,
        "warmup_frac": 0.0,
        "eval_every": 1,
        "num_eval_prompts": 3,
        "save_every": 1,
    }
    return PreferenceConfig(**(settings | changes))  # pyright: ignore[reportArgumentType]


def train(session: Session, hydra: HydraModel, method: str, **changes: object) -> None:
    """Stage 2 on the pairs, with looks at held-out ones and at prompts."""
    train_preference_stage(
        session,
        hydra,
        chat(hydra),
        pairs(),
        config(**changes),
        method=method,
        ppo=ppo_config(),
        seed=3,
        held_out_pairs=pairs(3),
        held_out=HeldOut(prompts=prompts()),
    )


def gradients(hydra: HydraModel, method: str, budget: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """(losses, gradients) of one batch of all pairs."""
    settings = config()
    task = Task(
        stage="preference",
        parameters=trained_parameters(hydra, ["actor"], None),
        learning_rate=1.0,
        look=lambda micro_batch, batch: look(hydra, PAIR_READERS[method], micro_batch, batch),
        loss=preference_loss(method, settings),
        evaluate=None,
    )
    optimizer = build_optimizer(task.parameters, 1.0, settings, 1)
    losses = add_gradients(hydra, pairs(), task, optimizer, StageLimits(micro_batch_tokens=budget))
    found = {name: p.grad.clone() for name, p in task.parameters.items() if p.grad is not None}
    assert found.keys() == task.parameters.keys()
    return losses, found


def test_at_first_dpo_loses_exactly_log_2(family: str):
    """The actor is the reference: every log-ratio is zero, and not just nearly."""
    hydra = tiny_hydra("dpo", family)
    for budget in (10_000, 48):
        losses, found = gradients(hydra, "dpo", budget)
        assert losses["train/margin"] == 0
        assert losses["train/pair_accuracy"] == 0.5
        assert losses["loss/preference"] == losses["loss/total"] == pytest.approx(math.log(2), abs=1e-7)
        assert any(gradient.any() for gradient in found.values())


def test_only_the_actors_set_learns_and_lora_off_stays_the_reference(method: str, family: str):
    hydra = tiny_hydra(method, family)
    before, said = snapshot(hydra), hydra.evaluate(ragged_batch(), ["reference"])["reference"]
    session = Session()
    train(session, hydra, method)
    after = snapshot(hydra)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in after if ".lora_" in name}
    assert torch.equal(hydra.evaluate(ragged_batch(), ["reference"])["reference"].logprobs, said.logprobs)
    first, *_, last = session.history
    assert last["eval/preference_loss"] < first["eval/preference_loss"]  # of some of the pairs that are learned
    assert last["eval/kl"] != 0
    assert {name for name in last if name.startswith("eval/")} == {
        "eval/preference_loss",
        "eval/pair_accuracy",
        "eval/margin",
        "eval/kl",
        "eval/response_tokens",
        "eval/eos_frac",
    }  # nothing scores here, so there is no eval/score
    assert {name for name, p in hydra.named_parameters() if p.requires_grad} == moved


def test_trunk_passes_per_micro_batch_counted_by_hooks(method: str):
    hydra = tiny_hydra(method)
    calls: list[bool] = []
    hydra.trunk("sft").decoder.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    gradients(hydra, method, 10_000)
    assert len(calls) == TRUNK_PASSES[method]
    assert calls[-1]
    assert not any(calls[:-1]), "who only reads needs no graph"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_and_checkpointing_do_not_change_gradients(method: str, checkpointing: bool):
    """float64: 1e-10 between one micro-batch and many, with and without recomputation."""
    found = []
    for budget in (10_000, 48, 1):
        hydra = tiny_hydra(method, "llama", torch.float64)
        randomise_adapters(hydra)
        hydra.double()
        if checkpointing:
            hydra.enable_checkpointing()
        found.append(gradients(hydra, method, budget))
    for losses, grads in found[1:]:
        assert losses == pytest.approx(found[0][0], abs=1e-6)
        for name, gradient in grads.items():
            assert_close(gradient, found[0][1][name], atol=1e-10, rtol=0)


def test_the_loss_is_that_of_pairs_read_one_by_one():
    """Summed log-ratios of each pair alone, without padding, in Python's own arithmetic."""
    hydra = tiny_hydra("dpo", "llama", torch.float64)
    randomise_adapters(hydra)
    hydra.double()
    losses, _ = gradients(hydra, "dpo", 48)
    expected = 0.0
    with torch.no_grad():
        for pair in pairs():
            ((_, batch),) = token_micro_batches([pair], 10_000, pad_id=0, device=torch.device("cpu"))
            said = hydra.evaluate(batch, ["actor", "reference"])
            ratios = (said["actor"].logprobs - said["reference"].logprobs).sum(dim=1).tolist()
            expected += math.log(1 + math.exp(-0.1 * (ratios[0] - ratios[1]))) / 8
    assert losses["loss/total"] == pytest.approx(expected, abs=1e-10)


def test_save_load_and_the_next_steps_are_bit_equal(method: str, tmp_path):
    """Three steps at a stretch, and the same three with a fresh process's objects after every step."""

    def run(name: str, num_lives: int):
        recipe = Recipe(name=name, output_dir=str(tmp_path), method=method)  # pyright: ignore[reportArgumentType]
        for life in range(num_lives):
            hydra = tiny_hydra(method)
            with Run.open(recipe, resume=life > 0) as opened:
                session = Session(opened)
                if life < num_lives - 1:
                    session.save = stop_after(session, life + 1)  # pyright: ignore[reportAttributeAccessIssue]
                    with pytest.raises(KeyboardInterrupt):
                        train(session, hydra, method)
                else:
                    train(session, hydra, method)
        samples = (tmp_path / name / "samples.jsonl").read_text()
        lines = [strip(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return snapshot(hydra), lines, samples  # pyright: ignore[reportPossiblyUnboundVariable]

    straight, straight_lines, straight_samples = run("straight", 1)
    resumed, resumed_lines, resumed_samples = run("resumed", 3)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())
    assert straight_lines == resumed_lines
    assert straight_samples == resumed_samples
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


def test_counted_bytes_equal_held_bytes(method: str):
    hydra = tiny_hydra(method)
    counted = count_method(hydra.table, base_sizes(hydra))
    lora = list(hydra.trunk("sft").adapter_parameters("actor").values())
    assert counted.trunks == count_tensor_bytes(hydra.trunk("sft").base_parameters().values())
    assert counted.adapters == count_tensor_bytes(lora)
    optimizer = build_optimizer(trained_parameters(hydra, ["actor"], None), 1.0, config(), 1)
    state = [tensor for name, tensor in optimizer.state().items() if "/" in name]
    assert counted.optimizer == count_tensor_bytes(state)
    assert counted.heads == 0


# --- the memory plan ------------------------------------------------------------------------------------------------

POINTS = [
    # (method, dtype, vocabulary, checkpointed layers, pairs in a batch, pairs in a micro-batch)
    ("dpo", "float32", 2048, 0, 3, 3),
    ("simpo", "float32", 300, 0, 2, 1),
    ("dpo", "bfloat16", 300, 3, 2, 1),
]
PROMPT, RESPONSE = 48, 24


@pytest.mark.parametrize("point", POINTS, ids=lambda point: "-".join(map(str, point)))
def test_planned_bytes_are_measured_bytes(point: tuple[str, str, int, int, int, int]):
    """Within 10 %, over a step of full-length pairs."""
    method, dtype, vocab, checkpointed, batch_size, micro_pairs = point
    shape = LlamaConfig(
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=64,
        intermediate_size=176,
        max_position_embeddings=512,
        vocab_size=vocab,
        tie_word_embeddings=True,
    )
    others = TensorBytes()
    others.hold_existing()
    lora, model = LoraConfig(rank=4, alpha=8.0), ModelConfig(path="unused", dtype=dtype)  # pyright: ignore
    sizes = sizes_of(meta_trunk(shape, model), lora, optimizer="adamw")
    work = Workload(
        prompt_tokens=PROMPT,
        response_tokens=RESPONSE,
        data_response_tokens=RESPONSE,
        num_sequences=4,
        minibatch_size=4,
        batch_size=batch_size,
    )
    micro_batch_tokens = micro_pairs * 2 * (PROMPT + RESPONSE)
    cuts = Cuts(micro_batch_tokens=micro_batch_tokens, rollout_rows=1, checkpointed_layers=checkpointed)
    planner = Planner(Simulation(shape, model, lora, tile_bytes=LOGIT_TILE_BYTES), sizes, work)
    planned = total(planner.preference(ROLES[method], PAIR_READERS[method], cuts)["preference"])

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(copy.deepcopy(shape), attn_implementation=attention_implementation(shape))
    hydra = HydraModel(ROLES[method], {"sft": Trunk(to_dtype(base, DTYPES[dtype]))}, tokenizer(), lora=lora)
    if checkpointed:
        hydra.enable_checkpointing(checkpointed)
    memory = PhaseMemory(track_tensors=True)
    train_preference_stage(
        Session(memory=memory),
        hydra,
        chat(hydra),
        pairs(batch_size, PROMPT, RESPONSE),
        config(batch_size=batch_size, num_epochs=1.0, micro_batch_tokens=micro_batch_tokens, eval_every=0),
        method=method,
        ppo=ppo_config(),
        seed=0,
    )
    found = memory.as_dict()["preference"]["peak_tensor_bytes"] - others.live
    assert abs(planned / found - 1) <= 0.10, (planned, found)
