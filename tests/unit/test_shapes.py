"""Shapes by name, and random weights that are made where they stay."""

import pytest
import torch

from hydra_rlhf.config import ModelConfig
from hydra_rlhf.errors import ModelError
from hydra_rlhf.model import shapes
from hydra_rlhf.model.quantized import QuantizedLinear
from hydra_rlhf.runtime.tensor_bytes import TensorBytes


def config_of(name: str, **settings: str) -> tuple[ModelConfig, shapes.PretrainedConfig]:
    """Model settings and the config of two layers of a shape, with a small vocabulary."""
    model = ModelConfig(path=f"shape:{name}", device="cpu", **settings)  # pyright: ignore[reportArgumentType]
    config = shapes.with_layers(shapes.find_config(model), 2)
    config.vocab_size = 512
    return model, config


@pytest.mark.parametrize(("alias", "name"), shapes.ALIASES.items())
def test_aliases_are_the_shapes_they_stand_for(alias: str, name: str):
    found = shapes.find_config(ModelConfig(path=f"shape:{alias}"))
    assert found.hidden_size == shapes.SHAPES[name]["hidden_size"]


def test_an_unknown_shape_names_the_known_ones():
    with pytest.raises(ModelError, match="shape:llama-2-7b"):
        shapes.find_config(ModelConfig(path="shape:llama-70b"))


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_random_weights_are_made_once_and_in_their_own_dtype(quantization: str):
    model, config = config_of("smollm2-135m", dtype="bfloat16", quantization=quantization)
    with TensorBytes() as count:
        trunk = shapes.random_trunk(config, model)
    assert {parameter.dtype for parameter in trunk.parameters()} == {torch.bfloat16}
    assert trunk.lm_head.weight is trunk.model.get_input_embeddings().weight  # tied
    # Never twice, nor wider: a head lives beside the embedding until both are tied; of what is packed, one matrix in
    # bfloat16, in float32 and as its quotient.
    head, largest = 2 * 512 * 576, 576 * 1536
    assert count.peak <= count.live + {"none": head, "int8": (2 + 4 + 4) * largest}[quantization]
    if quantization == "none":
        assert count.live <= 1.01 * 2 * sum(parameter.numel() for parameter in trunk.parameters())


@pytest.mark.parametrize("name", ["gpt2", "smollm2-135m"])
def test_packed_random_weights_are_a_whole_model(name: str):
    plain_model, config = config_of(name)
    plain = shapes.random_trunk(config, plain_model)
    packed_model, config = config_of(name, quantization="int8")
    packed = shapes.random_trunk(config, packed_model)
    assert any(isinstance(module, QuantizedLinear) for module in packed.modules())
    assert not [n for n, x in [*packed.named_parameters(), *packed.named_buffers()] if x.is_meta]
    # What is computed and not drawn (rotary frequencies, causal masks) is as in the plain model.
    buffers = {n: x for n, x in packed.named_buffers() if "." in n and n in dict(plain.named_buffers())}
    assert all(torch.equal(x, dict(plain.named_buffers())[n]) for n, x in buffers.items())
    assert buffers or name == "gpt2"
    tokens = torch.arange(8)[None]
    states = packed.hidden_states(tokens, torch.ones_like(tokens, dtype=torch.bool), adapter=None)
    assert states.isfinite().all()
    assert states.std() == pytest.approx(1.0, abs=0.05)  # a final norm with weight one
