"""Bytes that a method's tables make a run hold, counted from the role table. Imports no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hydra_rlhf.model.roles import ROLES, TRAINABLE_ROLES, Role, RoleTable, adapters, passes, trunks

FP32 = 4
MOMENTS = 2 * FP32
"""Adam's two moments, float32, per trained number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSizes:
    """What one base model and one LoRA set on it come to."""

    num_parameters: int
    """Numbers in the model, tied ones once."""
    num_lm_head: int
    """Numbers in an untied LM head, which trunks without an LM role do without; 0 where it is tied."""
    num_lora: int
    """Numbers in one LoRA set."""
    num_scalar_head: int
    """Numbers in one reward or value head."""
    weight_bytes: int
    """Bytes per number of the base: 4 for float32, 2 for bfloat16."""
    lora_bytes: int
    """Bytes per number of the LoRA sets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodBytes:
    """Bytes one method holds besides activations and the KV cache."""

    trunks: int
    adapters: int
    heads: int
    gradients: int
    """At most: roles learn one pass at a time, so only the largest pass's gradients live at once."""
    optimizer: int
    """Adam's moments, and float32 master copies of trained 16-bit tensors."""
    total: int


def count_method(table: RoleTable, sizes: BaseSizes) -> MethodBytes:
    """Bytes of one method on this base."""
    trunk_bytes = sum(trunk_numbers(table, name, sizes) for name in trunks(table)) * sizes.weight_bytes
    lora_bytes = len(adapters(table)) * sizes.num_lora * sizes.lora_bytes
    scalar_heads = {(role.trunk, role.head) for role in table.values() if role.head != "lm"}
    head_bytes = len(scalar_heads) * sizes.num_scalar_head * FP32
    gradients, optimizer = [0], 0
    learning = {name: table[name] for name in TRAINABLE_ROLES if name in table}
    for (trunk, adapter), roles in passes(learning).items():
        body = sizes.num_lora if adapter is not None else trunk_numbers(table, trunk, sizes)
        bytes_each = sizes.lora_bytes if adapter is not None else sizes.weight_bytes
        head = sum(sizes.num_scalar_head for role in roles.values() if role.head != "lm")
        gradients.append(body * bytes_each + head * FP32)
        optimizer += (body + head) * MOMENTS + (body * FP32 if bytes_each < FP32 else 0)
    return MethodBytes(
        trunks=trunk_bytes,
        adapters=lora_bytes,
        heads=head_bytes,
        gradients=max(gradients),
        optimizer=optimizer,
        total=trunk_bytes + lora_bytes + head_bytes + max(gradients) + optimizer,
    )


def trunk_numbers(table: RoleTable, trunk: str, sizes: BaseSizes) -> int:
    """Numbers in one trunk of a method, without an LM head that none of its roles reads."""
    reads_lm = any(role.trunk == trunk and role.head == "lm" for role in table.values())
    return sizes.num_parameters - (0 if reads_lm else sizes.num_lm_head)


def count_all(table: RoleTable, sizes: BaseSizes, *, dtype: str) -> dict[str, Any]:
    """The counted part of memory.json: every method on this base, and this run's roles."""
    return {
        "dtype": dtype,
        "methods": {name: asdict(count_method(method, sizes)) for name, method in ROLES.items()},
        "roles": {name: describe_role(name, role, table, sizes) for name, role in table.items()},
    }


def describe_role(name: str, role: Role, table: Mapping[str, Role], sizes: BaseSizes) -> dict[str, Any]:
    """Where a role lives and how many bytes it trains."""
    trained = 0
    if name in TRAINABLE_ROLES:
        on_lora = role.adapter is not None
        body = (
            sizes.num_lora * sizes.lora_bytes
            if on_lora
            else trunk_numbers(table, role.trunk, sizes) * sizes.weight_bytes
        )
        trained = body + (0 if role.head == "lm" else sizes.num_scalar_head * FP32)
    return {"trunk": role.trunk, "adapter": role.adapter, "head": role.head, "bytes_trained": trained}
