"""Bytes that one decoder layer keeps for backward per token, with a LoRA set on it and without checkpointing.

    python benchmarks/memory_kept.py

Prints one JSON line. Counted with saved-tensor hooks: every storage that autograd holds, once and whole, without
parameters and buffers. Two depths are run and subtracted, so that embeddings, masks and the final norm drop out. The
unit is two bytes (four in float32) per hidden entry, as in the formula; PEFT's default runs on the same shape beside
it.
"""

import argparse
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM

from hydra_rlhf.model.load import attention_implementation, to_dtype
from hydra_rlhf.model.trunk import Trunk

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TARGETS = {
    "q,k,v,o": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
DEPTHS = (2, 3)
"""The first layer is left out of the difference: nothing before it learns, so it may keep less."""
ROWS, COLUMNS = 2, 32
VOCAB = 128
ADAPTER = "actor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama without its depth and vocabulary."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    rank: int


SHAPES = {
    "llama-7b": Shape(hidden=4096, mlp=11008, heads=32, kv_heads=32, rank=128),
    "llama-7b / 16": Shape(hidden=256, mlp=688, heads=8, kv_heads=8, rank=8),
}
"""The true shape and its ratios at a sixteenth of the width. This project's own code runs the true shape on the meta
device; PEFT's runs on the CPU always, since `sdpa` attention on meta tensors is not the kernel that trains."""


def ideal_units(shape: Shape, targets: str) -> float:
    """What a layer cannot do without, in hidden entries per token.

    Its input and the middle of the residual stream for the norms, one normed input per group of LoRA linears that
    share it, q, k, v and the attention's output (which is o's LoRA input), gate and up, and the low-rank activations.
    """
    d, q, kv = shape.hidden, shape.hidden, shape.hidden * shape.kv_heads // shape.heads
    normed_inputs = {"q,k,v,o": 1, "all-linear": 2}[targets]
    entries = 2 * d + normed_inputs * d + q + 2 * kv + q + 2 * shape.mlp + len(TARGETS[targets]) * shape.rank
    return entries / d


def llama(shape: Shape, num_layers: int, attention: str) -> LlamaForCausalLM:
    """A random Llama in float32 on the current default device."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=num_layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=VOCAB,
    )
    config._attn_implementation = attention or attention_implementation(config)
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def ours(shape: Shape, num_layers: int, targets: str, dtype: torch.dtype, device: str) -> tuple[nn.Module, Any]:
    """This project's layers: a float32 LoRA set on a base of `dtype`."""
    with torch.device(device):
        trunk = Trunk(to_dtype(llama(shape, num_layers, ""), dtype))
    trunk.add_adapter(
        ADAPTER,
        rank=shape.rank,
        alpha=2.0 * shape.rank,
        targets=TARGETS[targets],
        dtype=torch.float32,
        seed_of=lambda _: 0,
    )
    for parameter in trunk.adapter_parameters(ADAPTER).values():
        parameter.requires_grad_(True)
    tokens, mask = inputs(device)
    return trunk, lambda: trunk.hidden_states(tokens, mask, adapter=ADAPTER)


def peft(shape: Shape, num_layers: int, targets: str, dtype: torch.dtype, device: str) -> tuple[nn.Module, Any]:
    """The same model as PEFT makes it by default: float32 adapters, each linear with its own cast of its input.

    Weights are zeros: what is kept does not depend on them, and seven billions' widths need not be drawn.
    """
    with torch.device("meta"):
        base = to_dtype(llama(shape, num_layers, "sdpa"), dtype)
    base.to_empty(device=device)
    for tensor in (*base.parameters(), *base.buffers()):
        tensor.data.zero_()
    config = PeftConfig(
        r=shape.rank, lora_alpha=2 * shape.rank, lora_dropout=0.0, target_modules=list(TARGETS[targets])
    )
    model = get_peft_model(base, config).train()
    tokens, _ = inputs(device)
    decoder = base.model
    return model, lambda: decoder(input_ids=tokens, use_cache=False).last_hidden_state  # no padding, so no mask


MAKERS = {"ours": ours, "peft_default": peft}


def inputs(device: str) -> tuple[Tensor, Tensor]:
    """Full rows: no token is padding."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (ROWS, COLUMNS), generator=generator).to(device)
    return tokens, torch.ones(ROWS, COLUMNS, dtype=torch.bool, device=device)


@contextmanager
def saved_storages() -> Iterator[dict[int, Tensor]]:
    """Every storage that autograd saves inside the block, by its address, held so that no address comes twice."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor.detach())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def kept_bytes(maker: str, shape: Shape, num_layers: int, targets: str, dtype: torch.dtype, device: str) -> int:
    """Bytes that a forward of the decoder leaves for backward."""
    gc.collect()  # the model before this one, which autograd's records and PEFT's wrappers hold in cycles
    model, forward = MAKERS[maker](shape, num_layers, targets, dtype, device)
    with saved_storages() as saved:
        output = forward()
    assert output.requires_grad
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in own)


def units_kept(maker: str, shape: Shape, targets: str, dtype: torch.dtype, device: str) -> float:
    """What one more layer keeps, in hidden entries of `dtype` per token."""
    few, many = (kept_bytes(maker, shape, depth, targets, dtype, device) for depth in DEPTHS)
    per_layer = (many - few) / (DEPTHS[1] - DEPTHS[0])
    return per_layer / (ROWS * COLUMNS * shape.hidden * dtype.itemsize)


def measure() -> list[dict[str, Any]]:
    """Every shape, target and dtype."""
    rows: list[dict[str, Any]] = []
    for name, shape in SHAPES.items():
        devices = {"ours": "meta" if name == "llama-7b" else "cpu", "peft_default": "cpu"}
        for targets in TARGETS:
            for dtype_name, dtype in DTYPES.items():
                ideal = ideal_units(shape, targets)
                units = {maker: units_kept(maker, shape, targets, dtype, devices[maker]) for maker in MAKERS}
                row = {"shape": name, **asdict(shape), "devices": devices, "targets": targets, "dtype": dtype_name}
                rows.append(row | {"ideal_units": ideal, **units, "ratio_to_ideal": units["ours"] / ideal})
    return rows


def main() -> None:
    """Print the rows."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    print(json.dumps({"unit": "hidden entries per token and layer, in the base's dtype", "rows": measure()}))


if __name__ == "__main__":
    main()
