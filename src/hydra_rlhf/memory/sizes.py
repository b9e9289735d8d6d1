"""Sizes of a base model and of what is put on it, read off a trunk; one on the meta device does as well."""

from collections.abc import Iterable

from torch import Tensor, nn

from hydra_rlhf.config import LoraConfig
from hydra_rlhf.memory.count import FP32, BaseSizes, Part
from hydra_rlhf.model.lora import find_linears, linear_features
from hydra_rlhf.model.trunk import Trunk
from hydra_rlhf.runtime.adam8bit import BLOCK, MIN_8BIT_SIZE

STEP_BYTES = 4
"""AdamW's step count, one float32 per tensor."""
NOTHING = Part(num_bytes=0, gradient_bytes=0, stepping_bytes=0, optimizer_bytes=0)


def sizes_of(trunk: Trunk, lora: LoraConfig, *, optimizer: str, below_rank: int = 0) -> BaseSizes:
    """What `trunk`, one LoRA set of `lora` and a scalar head on it take, with `optimizer` where they are trained.

    `below_rank` is the rank of the LoRA set that stage 1 left on a quantised base (0 = none).
    """
    head, embedding = trunk.model.get_output_embeddings(), trunk.model.get_input_embeddings()
    untied = isinstance(head, nn.Module) and hasattr(head, "weight") and head.weight is not embedding.weight
    linears = {path: linear.linear for path, linear in trunk.lora_linears.items()}
    features = [linear_features(m) for m in (linears or find_linears(trunk.decoder, lora.targets)).values()]
    width = {"float32": 4, "bfloat16": 2}[lora.dtype]
    lora_tensors = [lora.rank * size for pair in features for size in pair]
    return BaseSizes(
        trunk=part_of(trunk.base_tensors().values(), optimizer),
        lm_head=part_of(head.parameters(), optimizer) if isinstance(head, nn.Module) and untied else NOTHING,
        lora=part(lora_tensors, width, optimizer),
        scalar_head=part([trunk.hidden_size, 1], FP32, optimizer),
        below_bytes=sum(below_rank * size for pair in features for size in pair) * width,
    )


def part_of(tensors: Iterable[Tensor], optimizer: str) -> Part:
    """Tensors of any dtypes as one part."""
    parts = [part([tensor.numel()], tensor.element_size(), optimizer) for tensor in tensors]
    return Part(
        num_bytes=sum(p.num_bytes for p in parts),
        gradient_bytes=sum(p.gradient_bytes for p in parts),
        stepping_bytes=sum(p.stepping_bytes for p in parts),
        optimizer_bytes=sum(p.optimizer_bytes for p in parts),
    )


def part(sizes: Iterable[int], width: int, optimizer: str) -> Part:
    """Tensors of these many numbers of `width` bytes each as one part."""
    sizes = list(sizes)
    return Part(
        num_bytes=sum(sizes) * width,
        gradient_bytes=sum(sizes) * width,
        stepping_bytes=sum(sizes) * max(width, FP32),
        optimizer_bytes=sum(state_bytes(size, width, optimizer) for size in sizes),
    )


def state_bytes(size: int, width: int, optimizer: str) -> int:
    """Bytes an optimizer keeps of one trained tensor of `size` numbers, `width` bytes each."""
    masters = size * FP32 if width < FP32 else 0
    if optimizer == "adamw-8bit" and size >= MIN_8BIT_SIZE:
        return masters + 2 * (size + FP32 * -(-size // BLOCK)) + STEP_BYTES
    return masters + 2 * size * FP32 + STEP_BYTES
