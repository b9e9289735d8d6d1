"""The memory plan against exact tensor bytes of real PPO steps, at points drawn by a committed seed."""

import copy
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
)

from contract.tiny import METHODS, chat, tokenizer
from hydra_rlhf.config import LoraConfig, ModelConfig, PPOConfig, SamplingConfig
from hydra_rlhf.data.formats import TokenizedPrompt
from hydra_rlhf.memory import simulate
from hydra_rlhf.memory.measure import count_tensor_bytes
from hydra_rlhf.memory.plan import Cuts, Planner, Workload, total
from hydra_rlhf.memory.simulate import Simulation
from hydra_rlhf.memory.sizes import sizes_of
from hydra_rlhf.model import device, sample
from hydra_rlhf.model.device import has_bfloat16_units as ask_the_machine  # the tests' own answer is put in its place
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.load import DTYPES, attention_implementation, to_dtype, without_dropout
from hydra_rlhf.model.logprobs import LOGIT_TILE_BYTES
from hydra_rlhf.model.roles import ROLES, trunks
from hydra_rlhf.model.shapes import meta_trunk
from hydra_rlhf.model.trunk import Trunk
from hydra_rlhf.runtime.measure import PhaseMemory
from hydra_rlhf.runtime.tensor_bytes import TensorBytes
from hydra_rlhf.stages.limits import StageLimits
from hydra_rlhf.stages.ppo import train_ppo_stage
from hydra_rlhf.stages.ppo_state import build_optimizers
from hydra_rlhf.stages.session import Session

SEED = 2309
NUM_POINTS = 24
TOLERANCE = 0.10
COMMON = {"num_hidden_layers": 6, "num_attention_heads": 4, "max_position_embeddings": 512}
LLAMA_LIKE = COMMON | {"hidden_size": 64, "num_key_value_heads": 2, "intermediate_size": 176}
FAMILIES = {
    "llama": lambda vocab: LlamaConfig(**LLAMA_LIKE, vocab_size=vocab, tie_word_embeddings=True),
    "llama-untied": lambda vocab: LlamaConfig(**LLAMA_LIKE, vocab_size=vocab, tie_word_embeddings=False),
    "qwen3": lambda vocab: Qwen3Config(**LLAMA_LIKE, head_dim=16, vocab_size=vocab, tie_word_embeddings=True),
    "mistral": lambda vocab: MistralConfig(**LLAMA_LIKE, head_dim=16, sliding_window=16, vocab_size=vocab),
    "gemma2": lambda vocab: Gemma2Config(**LLAMA_LIKE, head_dim=16, sliding_window=16, vocab_size=vocab),
    "opt": lambda vocab: OPTConfig(**COMMON, hidden_size=64, ffn_dim=256, word_embed_proj_dim=64, vocab_size=vocab),
    "gpt2": lambda vocab: GPT2Config(
        n_embd=64, n_layer=6, n_head=4, n_positions=512, vocab_size=vocab, bos_token_id=1, eos_token_id=2
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One setting to plan and to measure."""

    family: str
    method: str
    dtype: str
    lora_dtype: str
    rank: int
    targets: tuple[str, ...]
    vocab: int
    checkpointed: int
    num_sequences: int
    minibatch_size: int
    prompt: int
    response: int
    micro_rows: int
    rollout_rows: int
    kept_graphs: int = 1
    in_tiles: bool = False

    @property
    def name(self) -> str:
        """What the test is called."""
        return (
            f"{self.family}-{self.method}-{self.dtype}-r{self.rank}-ckpt{self.checkpointed}-"
            f"{self.num_sequences}x({self.prompt}+{self.response})-micro{self.micro_rows}-graphs{self.kept_graphs}"
            + ("-tiles" if self.in_tiles else "")
        )


def draw_points() -> list[Point]:
    """The points; in most of them a long batch makes activations weigh, in the others the weights do."""
    rng = random.Random(SEED)
    points: list[Point] = []
    for i in range(NUM_POINTS):
        heavy = i % 3 != 0
        num_sequences = rng.choice([6, 8] if heavy else [4])
        minibatch_size = rng.choice([num_sequences, num_sequences // 2])
        family = list(FAMILIES)[i % len(FAMILIES)]
        attention = ("c_attn", "c_proj") if family == "gpt2" else ("q_proj", "k_proj", "v_proj")
        points.append(
            Point(
                family=family,
                method=METHODS[i % len(METHODS)],
                dtype=rng.choice(["float32", "bfloat16"]),
                lora_dtype=rng.choice(["float32", "bfloat16"]),
                rank=rng.choice([4, 16]),
                targets=rng.choice([("all-linear",), attention]),
                vocab=rng.choice([300, 2048]),
                checkpointed=rng.choice([0, 0, 3, 6]),
                num_sequences=num_sequences,
                minibatch_size=minibatch_size,
                prompt=rng.choice([48, 96] if heavy else [16]),
                response=rng.choice([8, 12] if heavy else [6]),
                micro_rows=rng.choice([minibatch_size, 2]),
                rollout_rows=rng.choice([num_sequences, num_sequences // 2]),
            )
        )
    return points


GRAPHS_WAIT = [
    replace(point, minibatch_size=point.num_sequences, micro_rows=2, kept_graphs=3)
    for point in draw_points()
    if point.method == "j-hydra-ppo"
]
"""The drawn points of the method whose pass is joined, with graphs of three micro-batches waiting."""
IN_TILES = [
    replace(point, in_tiles=True)
    for point in draw_points()
    if point.dtype == "bfloat16" and point.method != "ppo" and point.rollout_rows < point.num_sequences
]
"""Points whose weights are laid out in tiles for a rollout, where the machine has units that want them."""
POINTS = [*draw_points(), *GRAPHS_WAIT, *IN_TILES]
SHARES: dict[str, float] = {}


def lora_of(point: Point) -> LoraConfig:
    """The point's adapters."""
    return LoraConfig(rank=point.rank, alpha=2.0 * point.rank, targets=point.targets, dtype=point.lora_dtype)  # pyright: ignore


def planner_of(point: Point) -> Planner:
    """From the config alone."""
    config = FAMILIES[point.family](point.vocab)
    model = ModelConfig(path="unused", dtype=point.dtype)  # pyright: ignore
    sizes = sizes_of(meta_trunk(config, model), lora_of(point), optimizer="adamw")
    simulation = Simulation(config, model, lora_of(point), tile_bytes=LOGIT_TILE_BYTES)
    work = Workload(
        prompt_tokens=point.prompt,
        response_tokens=point.response,
        data_response_tokens=point.response,
        num_sequences=point.num_sequences,
        minibatch_size=point.minibatch_size,
        batch_size=4,
    )
    return Planner(simulation, sizes, work)


def real_model(point: Point) -> HydraModel:
    """The method on random weights."""
    config = copy.deepcopy(FAMILIES[point.family](point.vocab))
    without_dropout(config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention_implementation(config))
    base = Trunk(to_dtype(model, DTYPES[point.dtype]))
    table = ROLES[point.method]
    names = trunks(table)
    copies = {name: base.plain_copy() for name in names[1:]}
    return HydraModel(table, {names[0]: base, **copies}, tokenizer(), lora=lora_of(point))


def measured(point: Point, model: HydraModel) -> dict[str, int]:
    """Peak tensor bytes of each phase over two PPO steps of full-length prompts and responses."""
    model.enable_checkpointing(point.checkpointed) if point.checkpointed else None
    generator = torch.Generator().manual_seed(1)
    prompts = [
        TokenizedPrompt(torch.randint(3, point.vocab, (point.prompt,), generator=generator).tolist(), f"prompt {i}")
        for i in range(point.num_sequences)
    ]
    config = PPOConfig(
        num_steps=1,
        rollout_batch_size=point.num_sequences,
        minibatch_size=point.minibatch_size,
        num_epochs=1,
        micro_batch_tokens=point.micro_rows * (point.prompt + point.response),
        sampling=SamplingConfig(
            max_response_tokens=point.response, min_response_tokens=point.response, batch_rows=point.rollout_rows
        ),
        eval_every=0,
        num_logged_samples=0,
    )
    memory = PhaseMemory(track_tensors=True)
    limits = replace(StageLimits.of(config), kept_graphs=point.kept_graphs)
    train_ppo_stage(Session(memory=memory), model, chat(model), prompts, config, seed=0, limits=limits)
    return {name: seen["peak_tensor_bytes"] for name, seen in memory.as_dict().items()}


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_planned_bytes_are_measured_bytes(point: Point, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each phase within 10 %; weights, adapters, heads and optimizer to the byte."""
    if point.in_tiles:
        monkeypatch.setattr(device, "has_bfloat16_units", ask_the_machine)
        for module in (sample, simulate):
            monkeypatch.setattr(module, "MIN_STEPS", 0)
    others = TensorBytes()
    others.hold_existing()
    planner, model = planner_of(point), real_model(point)
    cuts = Cuts(
        micro_batch_tokens=point.micro_rows * (point.prompt + point.response),
        rollout_rows=point.rollout_rows,
        checkpointed_layers=point.checkpointed,
        kept_graphs=point.kept_graphs,
    )
    planned = planner.ppo(model.table, cuts)
    held = planned["update"]
    weights = count_tensor_bytes(p for name in model.trunks for p in model.trunk(name).base_tensors().values())
    assert held["weights"] == weights
    heads = list(model.scalar_heads.parameters())
    lora = [p for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n]
    assert held["adapters"] == count_tensor_bytes([*heads, *lora])
    config = PPOConfig(rollout_batch_size=point.num_sequences, minibatch_size=point.minibatch_size)
    state = [t for o in build_optimizers(model, config).values() for n, t in o.state().items() if "/" in n]
    assert held["optimizer"] == sum(t.numel() * t.element_size() for t in state)
    del state
    found = {name: num_bytes - others.live for name, num_bytes in measured(point, model).items()}
    report: dict[str, Any] = {
        name: (found[name], total(parts), round(total(parts) / found[name] - 1, 3)) for name, parts in planned.items()
    }
    SHARES[point.name] = max((v["activations"] + v["cache"] + v["logits"]) / total(v) for v in planned.values())
    assert all(abs(share) <= TOLERANCE for _, _, share in report.values()), report
