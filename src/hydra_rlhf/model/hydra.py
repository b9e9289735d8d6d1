"""All models of one method: the trunks its table names, their adapters and heads; one pass per (trunk, adapter)."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hydra_rlhf.config import LoraConfig, ModelConfig
from hydra_rlhf.errors import CheckpointError, ConfigError
from hydra_rlhf.model.export import load_reward_head, save_peft_adapter
from hydra_rlhf.model.heads import ScalarHead
from hydra_rlhf.model.load import DTYPES, load_tokenizer, load_trunk
from hydra_rlhf.model.logprobs import LOGIT_TILE_BYTES, last_states, predicting_states, response_logprobs
from hydra_rlhf.model.roles import (
    ROLES,
    TRAINABLE_ROLES,
    Role,
    RoleTable,
    adapters,
    passes,
    rows_in_use,
    stage1_source,
    trunks,
)
from hydra_rlhf.model.trunk import Trunk, stop_token_ids
from hydra_rlhf.records import RoleOutput, TokenBatch
from hydra_rlhf.runtime.randomness import generator, seed_for


class HydraModel(nn.Module):
    """Every role of a method's table on shared weights.

    `trunks` and `scalar_heads` are built to fit the table; LM heads belong to their trunk. Roles in `TRAINABLE_ROLES`
    have gradients on their LoRA set where they have one, else on their trunk, and on their scalar head; others none.
    """

    def __init__(
        self,
        table: RoleTable,
        trunks_by_name: Mapping[str, Trunk],
        tokenizer: PreTrainedTokenizerBase,
        *,
        reward_heads: Mapping[str, ScalarHead] | None = None,
        lora: LoraConfig | None = None,
        seed: int = 0,
        logit_tile_bytes: int = LOGIT_TILE_BYTES,
    ) -> None:
        """Put heads and adapters on trunks that are already in storage of their own.

        `reward_heads` holds trained reward heads by trunk; a missing one starts at random (seeded). The value head
        starts as the reward head, and at zero where the table has no reward role. `logit_tile_bytes` bounds logits.
        """
        super().__init__()
        self.table = table
        self.tokenizer = tokenizer
        self.logit_tile_bytes = logit_tile_bytes
        self.trunks = nn.ModuleDict({name: trunks_by_name[name] for name in trunks(table)})
        self.scalar_heads = nn.ModuleDict()
        self._add_scalar_heads(reward_heads or {}, seed)
        self.lora = lora or LoraConfig()
        for adapter, trunk in adapters(table).items():
            self.add_adapter(adapter, trunk, self.lora, seed)
        for name in self.trunks:
            if not any(role.trunk == name and role.head == "lm" for role in table.values()):
                self.trunk(name).drop_lm_head()
        self.freeze_except(role for role in TRAINABLE_ROLES if role in table)

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        method: str = "hydra-ppo",
        sft: str | None = None,
        reward: str | None = None,
        with_reward: bool = True,
        with_critic: bool = True,
        model: ModelConfig | None = None,
        lora: LoraConfig | None = None,
        seed: int = 0,
    ) -> "HydraModel":
        """Load `path` (hub name or folder) once per distinct trunk of the method.

        Separate models come from `sft` and `reward` (default: `path`). Folders of this package bring their reward head.
        Without reward role or critic: for a reward function alone, for an advantage estimator that has no critic.
        """
        if method not in ROLES:
            raise ConfigError(f"method={method!r} is unknown; choose one of {', '.join(ROLES)}")
        table = rows_in_use(ROLES[method], with_reward=with_reward, with_critic=with_critic)
        folders = {"hydra_sft": path, "sft": sft or path, "reward_model": reward or path}
        return cls.from_stage1(
            table, folders, model=replace(model or ModelConfig(), path=path), lora=lora or LoraConfig(), seed=seed
        )

    @classmethod
    def from_stage1(
        cls,
        table: RoleTable,
        folders: Mapping[str, str],
        *,
        model: ModelConfig,
        lora: LoraConfig,
        seed: int,
        trust_remote_code: bool = False,
        logit_tile_bytes: int = LOGIT_TILE_BYTES,
    ) -> "HydraModel":
        """Load each stage-1 model of `folders` ({stage: folder or hub name}); one copy per trunk that starts as it."""
        loaded: dict[str, Trunk] = {}
        by_trunk: dict[str, Trunk] = {}
        heads: dict[str, ScalarHead] = {}
        for name in trunks(table):
            source = stage1_source(table, name)
            if source in loaded:
                by_trunk[name] = loaded[source].plain_copy()
            else:
                loaded[source] = load_trunk(folders[source], model, trust_remote_code=trust_remote_code)
                by_trunk[name] = loaded[source]
            head = load_reward_head(folders[source], offline=model.offline)
            if head is not None:
                heads[name] = head
        first = folders[stage1_source(table, trunks(table)[0])]
        tokenizer = load_tokenizer(first, model, trust_remote_code=trust_remote_code)
        return cls(
            table, by_trunk, tokenizer, reward_heads=heads, lora=lora, seed=seed, logit_tile_bytes=logit_tile_bytes
        )

    def enable_checkpointing(self, num_layers: int | None = None, *, offload: bool = False) -> None:
        """Recompute the first `num_layers` layers of every trunk in backward (None = all); see `Trunk`."""
        for name in self.trunks:
            self.trunk(name).enable_checkpointing(num_layers, offload=offload)

    def trunk(self, name: str) -> Trunk:
        """The trunk of this name."""
        trunk = self.trunks[name]
        assert isinstance(trunk, Trunk)
        return trunk

    def scalar_head(self, trunk: str, head: str) -> ScalarHead:
        """The reward or value head on a trunk."""
        module = self.scalar_heads[f"{trunk}/{head}"]
        assert isinstance(module, ScalarHead)
        return module

    def evaluate(
        self,
        batch: TokenBatch,
        roles: Iterable[str],
        *,
        temperature: float = 1.0,
        lm_mask: Bool[Tensor, "b r"] | None = None,
        adapter_when_off: str | None = None,
        entropy_gradient: bool = False,
    ) -> dict[str, RoleOutput]:
        """What the named roles say about a batch, with one trunk pass per (trunk, adapter) pair.

        `lm_mask` limits the LM head to these response tokens (default: all that count). `adapter_when_off` runs
        LoRA-off roles with that LoRA set: stage 1 may train them through one.
        """
        chosen = {name: self.table[name] for name in roles}
        outputs: dict[str, RoleOutput] = {}
        for (trunk, adapter), group in passes(chosen).items():
            hidden = self.trunk(trunk).hidden_states(
                batch.tokens, batch.attention_mask, adapter=adapter or adapter_when_off
            )
            for name, role in group.items():
                outputs[name] = self._read_out(role, hidden, batch, temperature, lm_mask, entropy_gradient)
        return outputs

    def _read_out(
        self,
        role: Role,
        hidden: Float[Tensor, "b s h"],
        batch: TokenBatch,
        temperature: float,
        lm_mask: Bool[Tensor, "b r"] | None,
        entropy_gradient: bool,
    ) -> RoleOutput:
        if role.head == "lm":
            mask = batch.response_mask if lm_mask is None else lm_mask
            head = self.trunk(role.trunk).lm_head
            in_tiles = partial(response_logprobs, tile_bytes=self.logit_tile_bytes)
            logprobs, entropy = in_tiles(
                head, hidden, batch, mask, temperature=temperature, entropy_gradient=entropy_gradient
            )
            return RoleOutput(logprobs=logprobs, entropy=entropy)
        head = self.scalar_head(role.trunk, role.head)
        if role.head == "value":
            return RoleOutput(values=head(predicting_states(hidden, batch)))
        return RoleOutput(scores=head(last_states(hidden, batch)))

    def add_adapter(self, adapter: str, trunk: str, lora: LoraConfig, seed: int) -> None:
        """Put a LoRA set that changes nothing yet on a trunk, initialised from (seed, adapter name, linear)."""
        self.trunk(trunk).add_adapter(
            adapter,
            rank=lora.rank,
            alpha=lora.alpha,
            targets=lora.targets,
            dtype=DTYPES[lora.dtype],
            seed_of=partial(seed_for, seed, "lora", adapter),
        )

    def trained_parameters(self, role_name: str) -> dict[str, dict[str, nn.Parameter]]:
        """The tensors a role trains, as {group: {name: parameter}} with groups `adapter` or `trunk`, and `head`."""
        role = self.table[role_name]
        trunk = self.trunk(role.trunk)
        if role.adapter is not None:
            named = trunk.adapter_parameters(role.adapter)
            groups = {"adapter": {f"{role.trunk}.{name}.{role.adapter}": p for name, p in named.items()}}
        else:
            groups = {"trunk": {f"{role.trunk}.{n}": p for n, p in trunk.base_parameters().items()}}
        if role.head != "lm":
            head = self.scalar_head(role.trunk, role.head)
            groups["head"] = {f"{role.trunk}.{role.head}_head.{n}": p for n, p in head.named_parameters()}
        return groups

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Every tensor that stage 2 changes, by name: what a checkpoint has to hold of the model."""
        return {
            name: parameter.detach()
            for role in TRAINABLE_ROLES
            if role in self.table
            for group in self.trained_parameters(role).values()
            for name, parameter in group.items()
        }

    @torch.no_grad()
    def load_trained_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `trained_state` returned. Raises `CheckpointError` where names or shapes differ."""
        own = self.trained_state()
        odd = sorted(set(own) ^ set(tensors)) + [n for n in own if n in tensors and own[n].shape != tensors[n].shape]
        if odd:
            raise CheckpointError(f"the checkpoint belongs to another model: {len(odd)} tensors differ, e.g. {odd[0]}")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def freeze_except(self, roles: Iterable[str]) -> None:
        """Let exactly these roles have gradients."""
        self.requires_grad_(False)
        for role in roles:
            for group in self.trained_parameters(role).values():
                for parameter in group.values():
                    parameter.requires_grad_(True)

    def reset_critic(self) -> None:
        """Make the critic say what the reward model says: copy its head (the critic's LoRA set must still be zero)."""
        if "critic" in self.table and "reward" in self.table:
            critic, reward = self.table["critic"], self.table["reward"]
            self.scalar_head(critic.trunk, "value").copy_from(self.scalar_head(reward.trunk, "reward"))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.trunk(next(iter(self.trunks))).device

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding; a tokenizer may have more ids."""
        return self.trunk(next(iter(self.trunks))).num_embeddings

    @property
    def pad_id(self) -> int:
        """An id to fill masked columns with; what it means does not matter, masks are carried."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) and pad < self.vocab_size else 0

    @property
    def eos_id(self) -> int:
        """The stop token appended to responses in training: the tokenizer's EOS where it is one, else the first."""
        stops = self.stop_ids(None)
        return self.tokenizer.eos_token_id if self.tokenizer.eos_token_id in stops else stops[0]

    def stop_ids(self, chosen: tuple[int, ...] | None) -> tuple[int, ...]:
        """The ids that end a response: `chosen` if given, else what the policy's model names."""
        if chosen is not None and max(chosen) >= self.vocab_size:
            raise ConfigError(f"ppo.sampling.stop_token_ids={list(chosen)}: this model has ids below {self.vocab_size}")
        return chosen or stop_token_ids(self.trunk(next(iter(self.trunks))), self.tokenizer)

    def save_adapters(self, folder: str | Path) -> None:
        """Write the actor's LoRA set as a PEFT folder."""
        actor = self.table["actor"]
        if actor.adapter is None:
            raise ConfigError("this method trains its whole trunk and has no adapter to save; export it as `merged`")
        save_peft_adapter(self.trunk(actor.trunk), actor.adapter, Path(folder))

    def _add_scalar_heads(self, trained: Mapping[str, ScalarHead], seed: int) -> None:
        for role in self.table.values():
            if role.head == "lm":
                continue
            trunk = self.trunk(role.trunk)
            rng = generator(seed, "reward_head") if role.head == "reward" else None
            head = ScalarHead(trunk.hidden_size, generator=rng)
            if role.head == "reward" and role.trunk in trained:
                head.copy_from(trained[role.trunk])
            self.scalar_heads[f"{role.trunk}/{role.head}"] = head.to(trunk.device)
        self.reset_critic()
