"""What the plan makes of a few layers and one or two rows is what all layers and many rows need, to the byte."""

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, OPTConfig, Qwen3Config
from transformers.configuration_utils import PretrainedConfig

from hydra_rlhf.config import LoraConfig, ModelConfig
from hydra_rlhf.memory.meta_passes import ADAPTER, PassKind, Rows, run_layers, run_rollout
from hydra_rlhf.memory.simulate import Simulation
from hydra_rlhf.model.shapes import layer_period, meta_trunk

NUM_LAYERS = 7
SIZES = {"hidden_size": 64, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4, "vocab_size": 300}
LLAMA_LIKE = SIZES | {"num_key_value_heads": 2, "intermediate_size": 176, "head_dim": 16}
FAMILIES = {
    "llama": (LlamaConfig(**LLAMA_LIKE), 1),
    "gemma2": (Gemma2Config(**LLAMA_LIKE, sliding_window=16), 2),
    "opt": (OPTConfig(**SIZES, ffn_dim=256, word_embed_proj_dim=64), 1),
}
FULL_SFT, LORA = PassKind(learns=True), PassKind(learns=True, adapter=True)
PASSES = [(PassKind(), False), (PassKind(adapter=True), False), *((k, r) for k in (FULL_SFT, LORA) for r in (0, 1))]


def simulation(config: PretrainedConfig) -> Simulation:
    """Of a small base with LoRA on all linears."""
    return Simulation(config, ModelConfig(path="unused"), LoraConfig(rank=4), tile_bytes=2**20)


def whole_trunk(config: PretrainedConfig, *, recompute: int):
    """All layers, the first of them recomputed, with an adapter."""
    trunk = meta_trunk(config, ModelConfig(path="unused"))
    lora = {"rank": 4, "alpha": 8.0, "targets": ("all-linear",), "dtype": torch.float32}
    trunk.add_adapter(ADAPTER, **lora, seed_of=len)
    if recompute:
        trunk.enable_checkpointing(recompute)
    return trunk


@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_layers_and_rows_tell_of_all(family: str):
    config, period = FAMILIES[family]
    simulated = simulation(config)
    assert layer_period(simulated.whole) == period
    trunks = {recompute: whole_trunk(config, recompute=NUM_LAYERS * recompute) for recompute in (False, True)}
    for num in (1, 40):
        rows = Rows(num=num, prompt=24, response=8)
        for kind, recompute in PASSES:
            real = run_layers(trunks[bool(recompute)], kind, rows, period=1, known={})
            found = simulated.layers(kind, rows, recompute=bool(recompute))
            assert found.kept(num, NUM_LAYERS) == real.kept
            assert found.peak(num, NUM_LAYERS) == max(real.moments)
        real = run_rollout(trunks[False], rows, adapter=True, period=1, known={})
        found = simulated.decoding(rows, adapter=True)
        assert (found.kept(num, NUM_LAYERS), found.peak(num, NUM_LAYERS)) == (real.kept, max(real.moments))


def test_layers_that_do_not_repeat_are_all_run():
    types = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    layers = {"num_hidden_layers": 4, "layer_types": types, "sliding_window": 16, "use_sliding_window": True}
    config = Qwen3Config(**LLAMA_LIKE | layers)
    assert layer_period(simulation(config).whole) == 3
    config.layer_types = [types[2], *types[:2], types[0]]
    simulated = simulation(config)
    assert layer_period(simulated.whole) == 4
    rows = Rows(num=2, prompt=24, response=8)
    real = run_layers(whole_trunk(config, recompute=0), LORA, rows, period=4, known={})
    found = simulated.layers(LORA, rows, recompute=False)
    assert (found.kept(2, 4), found.peak(2, 4)) == (real.kept, max(real.moments))


@pytest.mark.parametrize("recompute", [1, 3, 6])
def test_some_layers_recomputed(recompute: int):
    config, _ = FAMILIES["llama"]
    rows = Rows(num=16, prompt=24, response=8)
    real = run_layers(whole_trunk(config, recompute=recompute), LORA, rows, period=1, known={})
    found = simulation(config).micro_batch(LORA, rows, checkpointed=recompute)
    # The layers left are not always those that keep most, and what begins backward is not taken off twice.
    assert found.kept == pytest.approx(real.kept, rel=0.03)
    assert found.peak == pytest.approx(max(real.moments), rel=0.03)
