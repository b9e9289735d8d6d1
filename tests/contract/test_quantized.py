"""What must hold on a packed base: stage 1 leaves a LoRA set under all others, and "LoRA off" is base and set."""

import json
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from contract.test_families import ours_logits, plain_logits
from contract.test_methods import changed, ppo_step, rollout_of, stop_after, strip, vars_of
from contract.tiny import (
    CONFIGS,
    LORA,
    alone,
    chat,
    ppo_config,
    prompts,
    ragged_batch,
    randomise_adapters,
    snapshot,
    tiny_trunk,
    tokenizer,
)
from hydra_rlhf import HydraModel, HydraSFTConfig, PreferencePair, save_model, train_hydra_sft
from hydra_rlhf.config import LoraConfig, ModelConfig, Recipe, SupervisedConfig
from hydra_rlhf.data.formats import TokenizedPair
from hydra_rlhf.errors import ConfigError, ModelError
from hydra_rlhf.memory.count import count_method
from hydra_rlhf.memory.measure import count_tensor_bytes
from hydra_rlhf.memory.sizes import sizes_of
from hydra_rlhf.model.export import (
    load_peft_adapter,
    merged_copy,
    save_merged,
    save_peft_adapter,
    save_reward_model,
    save_stage1,
)
from hydra_rlhf.model.heads import ScalarHead
from hydra_rlhf.model.load import load_trunk
from hydra_rlhf.model.quantized import QuantizedLinear
from hydra_rlhf.model.roles import STAGE1_TABLES
from hydra_rlhf.model.shapes import meta_trunk
from hydra_rlhf.model.trunk import Trunk
from hydra_rlhf.runtime.run import Run
from hydra_rlhf.stages import reward_model
from hydra_rlhf.stages.ppo import judge, train_ppo_stage
from hydra_rlhf.stages.ppo_state import build_optimizers
from hydra_rlhf.stages.ppo_update import update
from hydra_rlhf.stages.session import Session
from hydra_rlhf.stages.supervised import train_supervised

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # peft's
ROLE_NAMES = ("actor", "critic", "reference", "reward")
LORA_METHODS = ["d-lora-ppo", "j-hydra-ppo", "hydra-ppo"]
"""lora-ppo is d-lora-ppo with each trunk held twice: its storage is tested here, its arithmetic in test_methods."""
QUICK = {"rollout_batch_size": 4, "minibatch_size": 4, "num_epochs": 1, "micro_batch_tokens": 48}
PAIRS = [
    PreferencePair(prompt=f"the {noun} sat on", chosen=f" the {noun}", rejected=" a dog ran")
    for noun in ("cat", "mat", "hat", "rat", "bat", "fat")
]
STAGE1 = HydraSFTConfig(tuning="lora", num_epochs=2, batch_size=3, learning_rate=5e-2, eval_every=0)
STAGE1_STEPS = {"tuning": "lora", "num_epochs": 2.0, "batch_size": 3, "learning_rate": 5e-2, "save_every": 1}
LORA_WIDE = LoraConfig(rank=256, alpha=256.0)  # 4096 numbers in the smallest matrix: large enough for 8-bit moments


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=["nf4", "int8"])
def format(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def settings(format: str) -> ModelConfig:
    return ModelConfig(quantization=format, device="cpu", offline=True)


@pytest.fixture(scope="module")
def base(family: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of the family on the disk, in full precision."""
    folder = tmp_path_factory.mktemp(f"base-{family}")
    save_stage1(folder, tiny_trunk(family), tokenizer(), None)
    return str(folder)


@pytest.fixture(scope="module")
def stage1(base: str, settings: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What stage 1 left of it."""
    hydra = HydraModel.from_pretrained(base, model=settings, lora=LORA)
    train_hydra_sft(hydra, PAIRS, STAGE1)
    folder = tmp_path_factory.mktemp("stage1")
    save_stage1(folder, hydra.trunk("hydra"), tokenizer(), hydra.scalar_head("hydra", "reward"))
    return str(folder)


@pytest.fixture
def build(stage1: str, settings: ModelConfig) -> Callable[..., HydraModel]:
    """Makes the model of stage 2 from what stage 1 left."""

    def from_stage1(method: str = "hydra-ppo") -> HydraModel:
        return HydraModel.from_pretrained(stage1, method=method, model=settings, lora=LORA)

    return from_stage1


def held(hydra: HydraModel) -> dict[str, Tensor]:
    """Every tensor of a model, packed ones included."""
    packed = {name: tensor.clone() for name, tensor in hydra.named_buffers() if ".packed" in name or ".scale" in name}
    assert packed
    return snapshot(hydra) | packed


def lora_off(hydra: HydraModel) -> tuple[Tensor, Tensor]:
    """What the two roles that never change say."""
    outputs = hydra.evaluate(ragged_batch(), ["reference", "reward"])
    return outputs["reference"].logprobs, outputs["reward"].scores


def test_only_the_decoders_linears_are_packed(base: str, settings: ModelConfig, family: str):
    trunk, plain = load_trunk(base, settings), tiny_trunk(family)
    packed = {path for path, module in trunk.decoder.named_modules() if isinstance(module, QuantizedLinear)}
    assert packed == {p for p, m in plain.decoder.named_modules() if isinstance(m, nn.Linear) or "Conv1D" in str(m)[:6]}
    assert len(packed) == {"llama": 14, "gpt2": 8}[family]
    for name, tensor in trunk.base_parameters().items():
        assert torch.equal(tensor, plain.base_parameters()[name]), name
    held_bytes = count_tensor_bytes(tensor for name, tensor in trunk.model.state_dict().items())
    assert count_tensor_bytes(trunk.base_tensors().values()) == held_bytes
    assert trunk.count_lora(2, ("all-linear",)) == plain.count_lora(2, ("all-linear",))


def test_at_most_one_matrix_exists_twice_while_packing(base: str, settings: ModelConfig, monkeypatch):
    pack, alive, seen = QuantizedLinear.from_linear, [], []

    def watched(linear: nn.Module, format: str) -> QuantizedLinear:
        seen.append(sum(reference() is not None for reference in alive))
        alive.append(weakref.ref(linear))
        return pack(linear, format)

    monkeypatch.setattr(QuantizedLinear, "from_linear", watched)
    load_trunk(base, settings)
    assert len(seen) > 1
    assert not any(seen), "a plain linear outlived its packing"


def test_stage_1_trains_a_set_that_stays_and_the_base_stays_too(base: str, settings: ModelConfig):
    hydra = HydraModel.from_pretrained(base, model=settings, lora=LORA)
    trunk = hydra.trunk("hydra")
    before, raw = held(hydra), lora_off(hydra)
    history = train_hydra_sft(hydra, PAIRS, STAGE1)
    assert history[-1]["loss/total"] < history[0]["loss/total"]
    moved = changed(before, held(hydra))
    assert moved == {f"scalar_heads.hydra/{head}.{part}" for head in ("reward", "value") for part in ("weight", "bias")}
    assert trunk.switch.below == ("stage1",)
    stage1 = trunk.adapter_parameters("stage1")
    assert all(parameter.abs().sum() > 0 for parameter in stage1.values())
    assert not any(parameter.requires_grad for parameter in stage1.values())
    # It is part of LoRA off, and of every other pass.
    assert not torch.allclose(lora_off(hydra)[0], raw[0], atol=1e-3)
    assert_close(ours_logits(trunk, "actor", ragged_batch()), ours_logits(trunk, None, ragged_batch()))


def test_a_stage_1_folder_loads_bit_for_bit(base: str, stage1: str, settings: ModelConfig, build):
    hydra = HydraModel.from_pretrained(base, model=settings, lora=LORA)
    train_hydra_sft(hydra, PAIRS, STAGE1)
    loaded = build()
    for ours, theirs in zip(lora_off(hydra), lora_off(loaded), strict=True):
        assert torch.equal(ours, theirs)
    assert {entry.name for entry in Path(stage1).iterdir()} >= {
        "adapter",
        "quantized_base.json",
        "reward_head.safetensors",
        "tokenizer.json",
    }
    assert not (Path(stage1) / "model.safetensors").exists()
    # Its adapter is on the base in PEFT's eyes as well.
    assert json.loads((Path(stage1) / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == base


def test_the_critic_starts_as_the_reward_model(build):
    hydra, batch = build(), ragged_batch()
    for row in range(4):
        one = alone(batch, row)
        values = hydra.evaluate(one, ["critic"])["critic"].values[0]
        for t in range(1, values.shape[0]):
            cut = type(one)(
                tokens=one.tokens[:, : t - values.shape[0]],
                attention_mask=one.attention_mask[:, : t - values.shape[0]],
                response_mask=one.response_mask[:, :t],
            )
            assert_close(values[t], hydra.evaluate(cut, ["reward"])["reward"].scores[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", LORA_METHODS)
def test_ppo_changes_what_it_should_and_lora_off_never(method: str, build):
    hydra = build(method)
    before, off = held(hydra), lora_off(hydra)
    config = ppo_config(num_epochs=1)
    optimizers = build_optimizers(hydra, config)
    for step in range(2):
        ppo_step(hydra, config, optimizers, step)
    moved = changed(before, held(hydra))
    adapters = {n for n in before if ".lora_" in n and not n.endswith("stage1")}
    heads = {n for n in before if "/value." in n}
    assert moved == adapters | heads
    assert len(adapters) == (1 if method == "j-hydra-ppo" else 2) * 2 * len(
        hydra.trunk(actor_trunk(hydra)).lora_linears
    )
    assert all(torch.equal(a, b) for a, b in zip(off, lora_off(hydra), strict=True))


def actor_trunk(hydra: HydraModel) -> str:
    """Name of the trunk that the actor is on."""
    return hydra.table["actor"].trunk


@pytest.mark.parametrize("method", ["d-lora-ppo", "hydra-ppo"])
def test_counted_bytes_equal_held_bytes(method: str, build, family: str, settings: ModelConfig):
    """Packed weights, the sets below and the optimizer: from shapes on the meta device, and as they are held."""
    hydra = build(method)
    meta = meta_trunk(CONFIGS[family], settings)
    counted = count_method(hydra.table, sizes_of(meta, LORA, optimizer="adamw-8bit", below_rank=2))
    trunks = [hydra.trunk(name) for name in hydra.trunks]
    assert counted.trunks == count_tensor_bytes(tensor for trunk in trunks for tensor in trunk.base_tensors().values())
    lora = [parameter for name, parameter in hydra.named_parameters() if ".lora_" in name]
    assert counted.adapters == count_tensor_bytes(lora)
    optimizers = build_optimizers(hydra, ppo_config(optimizer="adamw-8bit")).values()
    state = [tensor for optimizer in optimizers for name, tensor in optimizer.state().items() if "/" in name]
    assert counted.optimizer == count_tensor_bytes(state)


def test_before_the_first_step_ratios_are_one(build):
    hydra = build()
    randomise_adapters_above(hydra)
    config = ppo_config(num_epochs=1, minibatch_size=8)
    rollout = rollout_of(hydra, config)
    targets = judge(rollout, config, kl_coef=0.0, scale=1.0)
    probe = ppo_config(**(vars_of(config) | {"actor_learning_rate": 1e-30, "critic_learning_rate": 1e-30}))
    metrics = update(hydra, build_optimizers(hydra, probe), rollout, targets, probe, step=0, seed=0)
    assert (metrics["ppo/ratio_max"], metrics["ppo/ratio_min"]) == (1, 1)


def randomise_adapters_above(hydra: HydraModel) -> None:
    """Give the actor and the critic effects of their own, and leave stage 1's set alone."""
    kept = {n: p.detach().clone() for n, p in hydra.named_parameters() if n.endswith("stage1")}
    randomise_adapters(hydra)
    with torch.no_grad():
        for name, parameter in hydra.named_parameters():
            if name in kept:
                parameter.copy_(kept[name])


def test_gradients_do_not_depend_on_checkpointing_or_on_when_backward_runs(build):
    batch, grads = ragged_batch(), []
    for checkpointing, interleaved in ((False, False), (True, False), (False, True), (True, True)):
        hydra = build()
        randomise_adapters_above(hydra)
        if checkpointing:
            hydra.enable_checkpointing()
        hydra.train()
        losses = {}
        for role, field in (("actor", "logprobs"), ("critic", "values")):
            output = getattr(hydra.evaluate(batch, [role])[role], field)
            losses[role] = torch.where(batch.response_mask, output, 0.0).sum()
            if not interleaved:
                losses[role].backward()
        if interleaved:
            with torch.no_grad():
                hydra.evaluate(batch, ["reference", "reward"])
            losses["critic"].backward()
            losses["actor"].backward()
        grads.append({n: p.grad for n, p in hydra.named_parameters() if p.grad is not None})
    assert {name.rpartition(".")[2] for name in grads[0] if ".lora_" in name} == {"actor", "critic"}
    assert all(grad.abs().sum() > 0 for grad in grads[0].values())
    for other in grads[1:]:
        assert other.keys() == grads[0].keys()
        for name, grad in other.items():
            assert_close(grad, grads[0][name], atol=1e-5 * float(grads[0][name].abs().max()), rtol=0)


def test_gradients_are_those_of_the_unpacked_model(build):
    """The same adapters on plain linears with the same weights, by the plain path: what packing must not change."""
    batch, packed = ragged_batch(), build()
    randomise_adapters_above(packed)
    plain = build()
    randomise_adapters_above(plain)
    trunk = plain.trunk("hydra")
    for linear in trunk.lora_linears.values():
        assert isinstance(linear.linear, QuantizedLinear)
        linear.linear = linear.linear.to_linear()
    grads = []
    for hydra in (packed, plain):
        hydra.evaluate(batch, ["actor"])["actor"].logprobs.sum().backward()
        grads.append({n: p.grad for n, p in hydra.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert_close(grad, grads[1][name], atol=1e-5 * float(grad.abs().max()), rtol=0)


def test_save_load_and_the_next_step_are_bit_equal(build, format: str, tmp_path):
    config = ppo_config(num_steps=2, save_every=1, **QUICK)

    def run(name: str, num_lives: int) -> tuple[dict[str, Tensor], list[dict]]:
        recipe = Recipe(name=name, output_dir=str(tmp_path), ppo=config)
        hydra = build()
        for life in range(num_lives):
            hydra = build()
            with Run.open(recipe, resume=life > 0) as opened:
                session = Session(opened)
                if life < num_lives - 1:
                    session.save = stop_after(session, life + 1)  # pyright: ignore[reportAttributeAccessIssue]
                    with pytest.raises(KeyboardInterrupt):
                        train_ppo_stage(session, hydra, chat(hydra), prompts(), config, seed=3)
                else:
                    train_ppo_stage(session, hydra, chat(hydra), prompts(), config, seed=3)
        return held(hydra), [strip(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    straight, straight_lines = run("straight", 1)
    resumed, resumed_lines = run("resumed", 2)
    assert not changed(straight, resumed)
    assert straight_lines == resumed_lines


def test_stage_1_resumes_bit_for_bit(base: str, settings: ModelConfig, tmp_path):
    """Four steps with 8-bit moments at a stretch, and the same four by two processes."""
    rows = [TokenizedPair([1, 5 + i], [7, 8 + i, 2], [9 + i, 2]) for i in range(6)]
    config = SupervisedConfig(**(vars_of(SupervisedConfig()) | STAGE1_STEPS | {"optimizer": "adamw-8bit"}))

    def run(name: str, num_lives: int) -> dict[str, Tensor]:
        recipe = Recipe(name=name, output_dir=str(tmp_path), reward_model=config)
        for life in range(num_lives):
            table = STAGE1_TABLES["reward_model"]
            trunk = load_trunk(base, settings)
            hydra = HydraModel(table, {"reward_model": trunk}, tokenizer(), lora=LORA_WIDE)
            with Run.open(recipe, resume=life > 0) as opened:
                session = Session(opened)
                learn = partial(train_supervised, session, hydra, rows, config, stage="reward_model")
                learn = partial(learn, loss=reward_model.loss, lora=LORA_WIDE, seed=0)
                if life < num_lives - 1:
                    session.save = stop_after(session, 2)  # pyright: ignore[reportAttributeAccessIssue]
                    with pytest.raises(KeyboardInterrupt):
                        learn()
                else:
                    learn()
        return held(hydra)

    straight, resumed = run("straight", 1), run("resumed", 2)
    assert any("stage1" in name for name in straight)
    assert not changed(straight, resumed)


@pytest.mark.parametrize("method", ["lora-ppo", "d-lora-ppo"])
def test_separate_trunks_have_stage_1s_sets_in_storage_of_their_own(method: str, build):
    hydra = build(method)
    num_trunks = {"lora-ppo": 4, "d-lora-ppo": 2}[method]
    assert len(hydra.trunks) == num_trunks
    pointers = [tensor.data_ptr() for tensor in (*hydra.parameters(), *hydra.buffers())]
    assert len(set(pointers)) == len(pointers)
    below = [hydra.trunk(name).adapter_parameters("stage1") for name in hydra.trunks]
    assert all(trunk.switch.below == ("stage1",) for trunk in map(hydra.trunk, hydra.trunks))
    for other in below[1:]:
        assert all(torch.equal(other[name], below[0][name]) for name in other)
    for name in hydra.trunks:
        first = next(iter(hydra.trunk(name).lora_linears.values()))
        assert first.switch is hydra.trunk(name).switch


def dequantized(stage1: str, settings: ModelConfig, folder: Path) -> str:
    """The base alone, unpacked, as a plain folder."""
    trunk = load_trunk(stage1, settings)
    trunk.switch.below = ()
    merged_copy(trunk, None).save(folder)
    return str(folder)


def test_the_exported_actor_is_one_peft_adapter_on_the_plain_base(stage1, settings, build, family, tmp_path):
    hydra, batch = build(), ragged_batch()
    randomise_adapters_above(hydra)
    trunk = hydra.trunk("hydra")
    save_peft_adapter(trunk, "actor", tmp_path / "actor")
    config = json.loads((tmp_path / "actor" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (4, 4.0, family == "gpt2")
    plain = AutoModelForCausalLM.from_pretrained(dequantized(stage1, settings, tmp_path / "plain"))
    without = plain_logits(plain, batch)
    theirs = plain_logits(PeftModel.from_pretrained(plain, str(tmp_path / "actor")), batch)
    assert_close(ours_logits(trunk, "actor", batch), theirs, atol=1e-4, rtol=1e-4)
    for other in (without, ours_logits(trunk, None, batch)):
        assert not torch.allclose(other, theirs, atol=1e-2)
    # Stage 1's set alone, under its own name, is not stacked on itself.
    save_peft_adapter(trunk, "stage1", tmp_path / "stage1")
    assert json.loads((tmp_path / "stage1" / "adapter_config.json").read_text())["r"] == 2


def test_merged_export_says_what_the_actor_said_and_leaves_the_base_alone(build, tmp_path):
    hydra, batch = build(), ragged_batch()
    randomise_adapters_above(hydra)
    trunk, before = hydra.trunk("hydra"), held(hydra)
    for adapter in ("actor", None):
        save_merged(trunk, adapter, hydra.tokenizer, tmp_path / str(adapter))
        merged = load_trunk(str(tmp_path / str(adapter)), ModelConfig(offline=True))
        assert_close(ours_logits(merged, None, batch), ours_logits(trunk, adapter, batch), atol=1e-4, rtol=1e-4)
    assert not changed(before, held(hydra))
    assert trunk.switch.below == ("stage1",)


def test_reward_export_scores_the_same(build, tmp_path):
    hydra, batch = build(), ragged_batch()
    role = hydra.table["reward"]
    save_reward_model(hydra.trunk(role.trunk), hydra.scalar_head(role.trunk, "reward"), hydra.tokenizer, tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    scores = hydra.evaluate(batch, ["reward"])["reward"].scores
    for row in range(4):
        one = alone(batch, row)
        logit = theirs(input_ids=one.tokens, attention_mask=one.attention_mask.long()).logits[0, 0]
        assert_close(logit + theirs.config.reward_bias, scores[row], atol=1e-4, rtol=1e-4)


def test_a_full_precision_start_is_packed_at_load_and_needs_no_set_below(family, settings, tmp_path):
    trunk = tiny_trunk(family)
    save_stage1(tmp_path, trunk, tokenizer(), ScalarHead(trunk.hidden_size, generator=torch.Generator().manual_seed(0)))
    hydra = HydraModel.from_pretrained(str(tmp_path), model=settings, lora=LORA)
    loaded: Trunk = hydra.trunk("hydra")
    assert (loaded.switch.below, loaded.quantized.path) == ((), str(tmp_path))
    assert hydra.scalar_head("hydra", "reward").weight.abs().sum() > 0
    before, off = held(hydra), lora_off(hydra)
    config = ppo_config(num_epochs=1)
    ppo_step(hydra, config, build_optimizers(hydra, config))
    moved = changed(before, held(hydra))
    assert moved
    assert all(".lora_" in name or "/value." in name for name in moved)
    assert all(torch.equal(a, b) for a, b in zip(off, lora_off(hydra), strict=True))


@pytest.mark.parametrize("trained", [True, False])
def test_a_saved_model_can_be_made_again(trained: bool, base, settings, tmp_path):
    """With the set of stage 1, and where there was no stage 1."""
    hydra = HydraModel.from_pretrained(base, model=settings, lora=LORA)
    if trained:
        train_hydra_sft(hydra, PAIRS, STAGE1)
    randomise_adapters_above(hydra)
    save_model(hydra, tmp_path)
    assert (tmp_path / "base" / "adapter").is_dir() == trained
    config = json.loads((tmp_path / "actor" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == (base, 4 if trained else 2)
    again = HydraModel.from_pretrained(str(tmp_path / "base"), model=settings, lora=LORA)
    assert all(torch.equal(a, b) for a, b in zip(lora_off(hydra), lora_off(again), strict=True))
    assert again.trunk("hydra").quantized == hydra.trunk("hydra").quantized


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization": "none"}, "model.quantization=none, but .* model.quantization="),
        ({"dtype": "bfloat16"}, "model.dtype=bfloat16, but .* model.dtype=float32"),
    ],
)
def test_a_set_of_another_packing_is_refused(change, message, stage1, settings):
    other = ModelConfig(**(vars_of(settings) | change))
    with pytest.raises(ModelError, match=message):
        HydraModel.from_pretrained(stage1, model=other, lora=LORA)


def test_targets_that_do_not_fit_the_set_below_are_refused(stage1, settings, family):
    target = {"llama": "q_proj", "gpt2": "c_attn"}[family]
    with pytest.raises(ConfigError, match=rf"lora.targets=\['{target}'\].*use lora.targets=\[c_|down_proj"):
        HydraModel.from_pretrained(stage1, model=settings, lora=LoraConfig(rank=2, targets=(target,)))


def test_a_base_that_is_gone_is_named(stage1, settings, tmp_path):
    import shutil

    shutil.copytree(stage1, tmp_path / "copy")
    file = tmp_path / "copy" / "quantized_base.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"path": str(tmp_path / "gone")}))
    with pytest.raises(ModelError, match="gone"):
        load_trunk(str(tmp_path / "copy"), settings)


def test_packed_weights_are_never_trained(base, settings):
    with pytest.raises(ConfigError, match=r"hydra_sft.tuning=full cannot train packed weights.*hydra_sft.tuning=lora"):
        train_hydra_sft(HydraModel.from_pretrained(base, model=settings, lora=LORA), PAIRS, HydraSFTConfig())
    whole = HydraModel.from_pretrained(base, method="ppo", model=settings)
    with pytest.raises(ConfigError, match="the actor trains its whole trunk, whose weights are packed"):
        build_optimizers(whole, ppo_config())


def test_a_peft_adapter_can_be_adopted(base, settings, family, tmp_path):
    """A LoRA set trained elsewhere becomes what is below all others, with its own rank."""
    trunk = tiny_trunk(family)
    trunk.add_adapter("a", rank=3, alpha=5.0, targets=("all-linear",), dtype=torch.float32, seed_of=lambda _: 1)
    for linear in trunk.lora_linears.values():
        nn.init.normal_(linear.lora_B["a"], 0.0, 0.3, generator=torch.Generator().manual_seed(0))
    save_peft_adapter(trunk, "a", tmp_path / "peft")
    packed = load_trunk(base, settings)
    load_peft_adapter(packed, "stage1", tmp_path / "peft")
    on = ours_logits(packed, "stage1", ragged_batch())
    packed.adopt_adapter("stage1")
    packed.adopt_adapter("stage1")
    assert packed.switch.below == ("stage1",)
    assert torch.equal(ours_logits(packed, None, ragged_batch()), on)
    save_stage1(tmp_path / "left", packed, tokenizer(), None)
    assert torch.equal(ours_logits(load_trunk(str(tmp_path / "left"), settings), None, ragged_batch()), on)
