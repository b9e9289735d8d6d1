"""Bytes that a method's tables make a run hold, counted from the role table. Imports no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hydra_rlhf.model.roles import ROLES, TRAINABLE_ROLES, Role, RoleTable, adapters, passes, rows_in_use, trunks

FP32 = 4
PARTS = ("weights", "adapters", "gradients", "optimizer", "batch", "cache", "activations", "logits")
"""What the bytes of a phase are made of, as the plan and the report name them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some tensors of a base: a whole trunk, its LM head, a LoRA set or a scalar head."""

    num_bytes: int
    """What they take as weights."""
    gradient_bytes: int
    """What their gradients take."""
    stepping_bytes: int
    """What their gradients take while the optimizer steps: those of 16-bit tensors as float32."""
    optimizer_bytes: int
    """What an optimizer keeps of them: moments, step counts, and float32 masters of trained 16-bit tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSizes:
    """What one base model, one LoRA set on it and one scalar head come to."""

    trunk: Part
    """All weights of the model, tied ones once."""
    lm_head: Part
    """An untied LM head, which trunks without an LM role do without; zero where it is tied."""
    lora: Part
    """One LoRA set."""
    scalar_head: Part
    """One reward or value head."""
    below_bytes: int = 0
    """A LoRA set that stage 1 left under the others on each trunk (quantised bases)."""


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
    trunk_bytes = sum(trunk_part(table, name, sizes).num_bytes for name in trunks(table))
    lora_bytes = len(adapters(table)) * sizes.lora.num_bytes + len(trunks(table)) * sizes.below_bytes
    scalar_heads = {(role.trunk, role.head) for role in table.values() if role.head != "lm"}
    head_bytes = len(scalar_heads) * sizes.scalar_head.num_bytes
    trained = [trained_parts(table, train_pass, sizes) for train_pass in learning_passes(table)]
    gradients = max((sum(part.gradient_bytes for part in parts) for parts in trained), default=0)
    optimizer = sum(part.optimizer_bytes for parts in trained for part in parts)
    return MethodBytes(
        trunks=trunk_bytes,
        adapters=lora_bytes,
        heads=head_bytes,
        gradients=gradients,
        optimizer=optimizer,
        total=trunk_bytes + lora_bytes + head_bytes + gradients + optimizer,
    )


def learning_passes(table: RoleTable) -> dict[tuple[str, str | None], dict[str, Role]]:
    """The roles that learn, grouped by the trunk pass they share."""
    return passes({name: table[name] for name in TRAINABLE_ROLES if name in table})


def trained_parts(table: RoleTable, train_pass: tuple[str, str | None], sizes: BaseSizes) -> list[Part]:
    """What one learning pass trains: its LoRA set or its whole trunk, and its scalar heads."""
    trunk, adapter = train_pass
    body = trunk_part(table, trunk, sizes) if adapter is None else sizes.lora
    roles = learning_passes(table)[train_pass].values()
    return [body, *(sizes.scalar_head for role in roles if role.head != "lm")]


def trunk_part(table: RoleTable, trunk: str, sizes: BaseSizes) -> Part:
    """One trunk of a method, without an LM head that none of its roles reads."""
    if any(role.trunk == trunk and role.head == "lm" for role in table.values()):
        return sizes.trunk
    whole, head = sizes.trunk, sizes.lm_head
    return Part(
        num_bytes=whole.num_bytes - head.num_bytes,
        gradient_bytes=whole.gradient_bytes - head.gradient_bytes,
        stepping_bytes=whole.stepping_bytes - head.stepping_bytes,
        optimizer_bytes=whole.optimizer_bytes - head.optimizer_bytes,
    )


def count_all(table: RoleTable, sizes: BaseSizes, *, dtype: str) -> dict[str, Any]:
    """The counted part of memory.json: every method on this base, with the rows that this run has, and its roles."""
    used = {"with_reward": "reward" in table, "with_critic": "critic" in table}
    return {
        "dtype": dtype,
        "methods": {name: asdict(count_method(rows_in_use(rows, **used), sizes)) for name, rows in ROLES.items()},
        "roles": {name: describe_role(name, role, table, sizes) for name, role in table.items()},
    }


def describe_role(name: str, role: Role, table: Mapping[str, Role], sizes: BaseSizes) -> dict[str, Any]:
    """Where a role lives and how many bytes it trains."""
    trained = 0
    if name in TRAINABLE_ROLES:
        body = sizes.lora if role.adapter is not None else trunk_part(table, role.trunk, sizes)
        trained = body.num_bytes + (0 if role.head == "lm" else sizes.scalar_head.num_bytes)
    return {"trunk": role.trunk, "adapter": role.adapter, "head": role.head, "bytes_trained": trained}
