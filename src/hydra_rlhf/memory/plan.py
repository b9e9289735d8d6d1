"""The memory plan: what each phase of a method holds, from the role table and the model's config, before any weight.

Weights, adapters, gradients and optimizer state are counted (`count.py`), activations, logits and the KV cache are
found on the meta device (`simulate.py`). Phases come one after the other: the peak is the largest, never their sum.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from hydra_rlhf.memory.count import PARTS, BaseSizes, Part, count_method, learning_passes, trained_parts
from hydra_rlhf.memory.simulate import PassBytes, PassKind, Rows, Simulation
from hydra_rlhf.model.roles import STAGE1_TABLES, Role, RoleTable, passes

TOKEN_BYTES = 8 + 1 + 1
"""Of each token of a rollout: id, attention mask, and at most one response mask."""
RESPONSE_TOKEN_BYTES = 5 * 4 + 3 * 4
"""Of each response token: log-probs of actor and reference, values, entropy, dense rewards; three targets."""

Phases = Mapping[str, Mapping[str, int]]
"""Bytes as {phase: {part: bytes}}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What one step of each stage works on, at most."""

    prompt_tokens: int
    response_tokens: int
    """Of a sampled response."""
    data_response_tokens: int
    """Of a response in the data, for supervised stages."""
    num_sequences: int
    """Of a rollout."""
    minibatch_size: int
    """Sequences of an optimizer step of PPO."""
    batch_size: int
    """Pairs of an optimizer step of a supervised stage."""
    num_held_out: int = 1
    """Held-out prompts that preference training answers at each look."""
    entropy_gradient: bool = False
    """The entropy is part of the policy's loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuts:
    """How work is cut to fit: memory knobs that change no result."""

    micro_batch_tokens: int
    """Padded tokens of a forward."""
    rollout_rows: int
    """Responses decoded together."""
    checkpointed_layers: int
    """Layers recomputed in backward."""
    kept_graphs: int = 1
    """Micro-batches of a joined pass whose graphs wait for the values of all rows."""


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans methods on one base model."""

    simulation: Simulation
    sizes: BaseSizes
    workload: Workload

    def ppo(self, table: RoleTable, cuts: Cuts) -> dict[str, dict[str, int]]:
        """Bytes of the phases rollout, score and update of stage 2."""
        held = self.held_stage2(table)
        work = self.workload
        sequence = work.prompt_tokens + work.response_tokens
        batch = work.num_sequences * (sequence * TOKEN_BYTES + work.response_tokens * RESPONSE_TOKEN_BYTES)
        held["batch"] = batch
        group = Rows(num=cuts.rollout_rows, prompt=work.prompt_tokens, response=work.response_tokens)
        micro = replace(group, num=micro_rows(cuts, sequence, work.num_sequences))
        score = max(
            (
                self.simulation.micro_batch(kind_of(adapter is not None, roles), micro)
                for (_, adapter), roles in passes(table).items()
            ),
            key=lambda found: found.peak,
        )
        return {
            "rollout": self._rollout(table, group, held),
            "score": phase(held, score),
            "update": self._update(table, cuts, held),
        }

    def preference(self, table: RoleTable, readers: Collection[str], cuts: Cuts) -> dict[str, dict[str, int]]:
        """Bytes of stage 2 from pairs: learning, where `readers` read each micro-batch before the actor learns from it,
        and rollout, the actor's responses to held-out prompts."""
        held = self.held_stage2(table)
        work = self.workload
        num = 2 * micro_rows(cuts, 2 * (work.prompt_tokens + work.data_response_tokens), work.batch_size)
        rows = Rows(num=num, prompt=work.prompt_tokens, response=work.data_response_tokens)
        ((train_pass, roles),) = learning_passes(table).items()
        trained = trained_parts(table, train_pass, self.sizes)
        kind = replace(kind_of(train_pass[1] is not None, roles), learns=True)
        need = self.simulation.micro_batch(kind, rows, checkpointed=cuts.checkpointed_layers)
        once = num == 2 * work.batch_size
        found = learning(held, trained, need, once=once)
        gradients = 0 if once else sum(part.gradient_bytes for part in trained)
        others = {name: role for name, role in table.items() if name in readers}
        for (_, adapter), roles in passes(others).items():
            reading = self.simulation.micro_batch(kind_of(adapter is not None, roles), rows)
            found.append(phase(held | {"gradients": gradients}, reading))
        group = Rows(num=cuts.rollout_rows, prompt=work.prompt_tokens, response=work.response_tokens)
        return {"preference": max(found, key=total), "rollout": self._rollout(table, group, held)}

    def _rollout(self, table: RoleTable, group: Rows, held: dict[str, int]) -> dict[str, int]:
        need = self.simulation.rollout(group, adapter=table["actor"].adapter is not None)
        held = held | {"cache": round(need.kept), "adapters": held["adapters"] + round(need.made)}
        return phase(held, replace(need, kept=0.0), less=need.kept)

    def _update(self, table: RoleTable, cuts: Cuts, held: dict[str, int]) -> dict[str, int]:
        work = self.workload
        sequence = work.prompt_tokens + work.response_tokens
        num = micro_rows(cuts, sequence, work.minibatch_size)
        rows = Rows(num=num, prompt=work.prompt_tokens, response=work.response_tokens)
        found: list[dict[str, int]] = []
        for train_pass, roles in learning_passes(table).items():
            kind = replace(
                kind_of(train_pass[1] is not None, roles),
                learns=True,
                entropy_gradient=work.entropy_gradient and "actor" in roles,
            )
            num_waiting = min(cuts.kept_graphs, -(-work.minibatch_size // num)) - 1 if len(roles) > 1 else 0
            trained = trained_parts(table, train_pass, self.sizes)
            need = self.simulation.micro_batch(kind, rows, checkpointed=cuts.checkpointed_layers)
            found += learning(held, trained, need, once=num == work.minibatch_size, num_waiting=num_waiting)
        return max(found, key=total)

    def stage1(self, stage: str, cuts: Cuts, *, lora: bool) -> dict[str, int]:
        """Bytes of a stage-1 model in training: all weights, or one LoRA set with `lora`."""
        table = STAGE1_TABLES[stage]
        work = self.workload
        pairs = "reward" in table
        sequence = work.prompt_tokens + work.data_response_tokens
        num = micro_rows(cuts, sequence * (2 if pairs else 1), work.batch_size) * (2 if pairs else 1)
        rows = Rows(num=num, prompt=work.prompt_tokens, response=work.data_response_tokens)
        kind = replace(kind_of(lora, table), learns=True, half=pairs)
        need = self.simulation.micro_batch(kind, rows, checkpointed=cuts.checkpointed_layers)
        once = num == work.batch_size * (2 if pairs else 1)
        held, trained = self.held_stage1(stage, lora), self._trained_in_stage1(table, lora)
        return max(learning(held, trained, need, once=once), key=total)

    def held_stage1(self, stage: str, lora: bool) -> dict[str, int]:
        """What stage 1 holds all along, however its work is cut."""
        body, *heads = trained = self._trained_in_stage1(STAGE1_TABLES[stage], lora)
        return dict.fromkeys(PARTS, 0) | {
            "weights": self.sizes.trunk.num_bytes,
            "adapters": (body.num_bytes if lora else 0) + sum(head.num_bytes for head in heads),
            "optimizer": sum(part.optimizer_bytes for part in trained),
        }

    def _trained_in_stage1(self, table: RoleTable, lora: bool) -> list[Part]:
        heads = [self.sizes.scalar_head for role in table.values() if role.head != "lm"]
        return [self.sizes.lora if lora else self.sizes.trunk, *heads]

    def held_stage2(self, table: RoleTable) -> dict[str, int]:
        """What stage 2 holds all along, however its work is cut."""
        counted = count_method(table, self.sizes)
        return dict.fromkeys(PARTS, 0) | {
            "weights": counted.trunks,
            "adapters": counted.adapters + counted.heads,
            "optimizer": counted.optimizer,
        }


def kind_of(adapter: bool, roles: Mapping[str, Role]) -> PassKind:
    """The pass that serves these roles."""
    heads = {role.head for role in roles.values()}
    return PassKind(adapter=adapter, lm_head="lm" in heads, value_head="value" in heads, reward_head="reward" in heads)


def micro_rows(cuts: Cuts, tokens_each: int, num: int) -> int:
    """How many of `num` items of `tokens_each` tokens a micro-batch takes: at least one."""
    return min(num, max(1, cuts.micro_batch_tokens // tokens_each))


def learning(
    held: dict[str, int], trained: list[Part], need: PassBytes, *, once: bool, num_waiting: int = 0
) -> list[dict[str, int]]:
    """The moments of a learning pass that may be its peak.

    From the second micro-batch on the gradients of the ones before are there through the whole pass. With a single
    micro-batch (`once`) they come as activations go. At the end the optimizer steps, with a float32 copy of 16-bit
    gradients, which die one by one. `num_waiting` more graphs are there while the first one is gone through.
    """
    gradients = sum(part.gradient_bytes for part in trained)
    stepping = held | {"gradients": sum(part.stepping_bytes for part in trained)}
    if num_waiting:
        first, second = beside(need, num_waiting * need.graph), beside(need, (num_waiting - 1) * need.graph)
        return [phase(held, first), phase(held | {"gradients": gradients}, second), stepping]
    if not once:
        return [phase(held | {"gradients": gradients}, need), stepping]
    late = replace(need, kept=0.0, head=0.0, peak=need.peak - max(need.kept, need.head - need.kept))
    return [phase(held, need), phase(held | {"gradients": gradients}, late), stepping]


def beside(need: PassBytes, more: float) -> PassBytes:
    """What a pass needs together with bytes that are there throughout."""
    return replace(need, kept=need.kept + more, head=need.head + more, peak=need.peak + more)


def phase(held: dict[str, int], need: PassBytes, *, less: float = 0.0) -> dict[str, int]:
    """What is held and what a pass needs on top, in parts; `less` of the need is among the held already."""
    logits = max(0.0, need.head - max(need.kept, less)) if need.head >= need.peak else 0.0
    return held | {"activations": round(need.peak - less - logits), "logits": round(logits)}


def total(parts: Mapping[str, int]) -> int:
    """Bytes of a phase."""
    return sum(parts.values())


def peak(phases: Phases) -> int:
    """The largest phase."""
    return max(total(parts) for parts in phases.values())
