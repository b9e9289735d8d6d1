"""The least work of one PPO step, in bytes read and floating-point operations, and the time it must take.

Pure arithmetic on a method's table and a model's sizes; no clock and no tensor. What is not needed is not counted:
recomputed layers, padding, a second forward where the first one's graph could have been kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hydra_rlhf.memory.count import learning_passes
from hydra_rlhf.model.roles import Role, RoleTable, passes

ATTENTION_BACKWARD = 2.5
"""Of attention's forward: four products for dQ, dK, dV and dP, and the scores once more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """What the arithmetic needs to know of a base model and one LoRA set on it."""

    block_params: int
    """Numbers in the matrices of the decoder."""
    head_params: int
    """Numbers in the LM head: vocabulary x width."""
    lora_params: int
    """Numbers in one LoRA set."""
    decode_bytes: int
    """Bytes of the weights that a decode step reads: the decoder's and the head's, as they are stored."""
    lora_bytes: int
    """Bytes of one LoRA set as it is stored."""
    num_layers: int
    query_width: int
    """Heads x their width."""
    cache_bytes: int
    """Of keys and values, per token, all layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one PPO step works on; lengths are means."""

    num_sequences: int
    prompt_tokens: float
    response_tokens: float
    num_epochs: int = 1
    num_greedy: int = 0
    """Further responses that are decoded and scored, and not learned from."""

    @property
    def num_decoded(self) -> int:
        """Responses that are decoded."""
        return self.num_sequences + self.num_greedy

    @property
    def num_tokens(self) -> float:
        """Prompt and response tokens of all sequences."""
        return self.num_sequences * (self.prompt_tokens + self.response_tokens)

    @property
    def num_response_tokens(self) -> float:
        """Response tokens of all sequences."""
        return self.num_sequences * self.response_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The least work of one PPO step."""

    decode_bytes: float
    """Read while responses are decoded: weights once a token, and the keys and values so far."""
    decode_flops: float
    prefill_flops: float
    score_flops: float
    """One forward of every trunk pass."""
    update_flops: float
    """A forward and a backward of every learning pass, in every epoch."""
    shared_flops: float
    """Part of `update_flops` that scoring has done already: the first epoch's forwards."""

    @property
    def learn_flops(self) -> float:
        """Scoring and updating together, with no forward done twice."""
        return self.score_flops + self.update_flops - self.shared_flops


def step_work(table: RoleTable, model: ModelSizes, batch: Batch) -> Work:
    """The least work of a method's step. Prompts are read at once; their last state gives the first token."""
    adapted = table["actor"].adapter is not None
    num_steps = max(0.0, batch.response_tokens - 1)
    context = batch.prompt_tokens + batch.response_tokens / 2
    read = model.decode_bytes + (model.lora_bytes if adapted else 0)
    read += batch.num_decoded * context * model.cache_bytes
    per_token = 2 * (model.block_params + model.head_params + (model.lora_params if adapted else 0))
    per_token += 4 * model.num_layers * model.query_width * context
    prompts = batch.num_decoded * batch.prompt_tokens
    learning = learning_passes(table)
    forwards = {key: forward_flops(model, batch, key[1], roles) for key, roles in passes(table).items()}
    learned = sum(forward_flops(model, batch, key[1], roles) for key, roles in learning.items())
    greedy = replace(batch, num_sequences=batch.num_greedy)
    scored = {"reward": table["reward"]} if "reward" in table else {}
    compared = sum(forward_flops(model, greedy, key[1], roles) for key, roles in passes(scored).items())
    backward = sum(backward_flops(model, batch, key[1], roles) for key, roles in learning.items())
    return Work(
        decode_bytes=num_steps * read,
        decode_flops=num_steps * batch.num_decoded * per_token,
        prefill_flops=trunk_flops(model, prompts, batch.prompt_tokens, adapted)
        + 2 * model.head_params * batch.num_decoded,
        score_flops=sum(forwards.values()) + compared,
        update_flops=batch.num_epochs * (learned + backward),
        shared_flops=learned,
    )


def trunk_flops(model: ModelSizes, num_tokens: float, length: float, adapted: bool) -> float:
    """A forward of the decoder over `num_tokens` tokens in causal sequences of `length`."""
    products = 2 * (model.block_params + (model.lora_params if adapted else 0))
    return num_tokens * (products + attention_flops(model, length))


def attention_flops(model: ModelSizes, length: float) -> float:
    """Of causal attention, per token: two products over half of `length` keys on average."""
    return 2 * model.num_layers * model.query_width * length


def head_flops(model: ModelSizes, batch: Batch, roles: Mapping[str, Role]) -> float:
    """The LM head on response tokens, where a role has it; a scalar head costs nothing that counts."""
    reads = any(role.head == "lm" for role in roles.values())
    return 2 * model.head_params * batch.num_response_tokens if reads else 0.0


def forward_flops(model: ModelSizes, batch: Batch, adapter: str | None, roles: Mapping[str, Role]) -> float:
    """One trunk pass over all sequences, with the heads of its roles."""
    length = batch.prompt_tokens + batch.response_tokens
    trunk = trunk_flops(model, batch.num_tokens, length, adapter is not None)
    return trunk + head_flops(model, batch, roles)


def backward_flops(model: ModelSizes, batch: Batch, adapter: str | None, roles: Mapping[str, Role]) -> float:
    """Its backward: input gradients cost one forward of the products, trained weights as much again.

    With an adapter the base and the head are frozen; the LoRA products are the trained ones.
    """
    length = batch.prompt_tokens + batch.response_tokens
    attention = ATTENTION_BACKWARD * attention_flops(model, length)
    head = head_flops(model, batch, roles)
    if adapter is None:
        return batch.num_tokens * (4 * model.block_params + attention) + 2 * head
    return batch.num_tokens * (2 * model.block_params + 4 * model.lora_params + attention) + head


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The least seconds of one PPO step on a machine, by phase."""

    generate_s: float
    score_s: float
    update_s: float
    shared_s: float
    """Part of `update_s` that scoring has done already."""

    @property
    def step_s(self) -> float:
        """Of the whole step, with no forward done twice."""
        return self.generate_s + self.score_s + self.update_s - self.shared_s


def bound(work: Work, *, bandwidth: float, matrix_rate: float) -> Bound:
    """`bandwidth` in bytes and `matrix_rate` in operations per second; decoding waits for the slower of the two."""
    decode = max(work.decode_bytes / bandwidth, work.decode_flops / matrix_rate)
    return Bound(
        generate_s=decode + work.prefill_flops / matrix_rate,
        score_s=work.score_flops / matrix_rate,
        update_s=work.update_flops / matrix_rate,
        shared_s=work.shared_flops / matrix_rate,
    )
