"""One decoder of `transformers` with its head and its LoRA sets; `load.py` makes one from a folder or a hub name."""

import copy
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from hydra_rlhf.errors import ConfigError, ModelError
from hydra_rlhf.model.fuse import fuse_layers
from hydra_rlhf.model.heads import LMHead
from hydra_rlhf.model.lora import (
    AdapterSwitch,
    LoraLinear,
    find_linears,
    linear_features,
    merge_into_linears,
    unwrap_linears,
    wrap_linears,
)
from hydra_rlhf.model.quantized import QuantizedBase, QuantizedLinear

transformers_logging.disable_progress_bar()  # its bars for loading and saving would break those of the stages


class Trunk(nn.Module):
    """A causal LM whose decoder, head and LoRA sets are reached separately.

    The decoder's own weights are frozen unless a role without an adapter trains them; every forward names its adapter.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.switch = AdapterSwitch()
        self.lora_linears: dict[str, LoraLinear] = {}
        """LoRA linears by their path in the decoder; empty before the first adapter."""
        self.quantized: QuantizedBase | None = None
        """What the decoder's packed linears were made from; None where its weights are plain."""
        self.model.requires_grad_(False)
        self.model.eval()
        fuse_layers(self.decoder)

    @property
    def decoder(self) -> nn.Module:
        """The model without its head."""
        return self.model.base_model

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states that the heads read (OPT projects it down to its embedding width)."""
        return self.model.get_input_embeddings().weight.shape[1]  # pyright: ignore[reportIndexIssue, reportReturnType]

    @property
    def num_embeddings(self) -> int:
        """Rows of the embedding; a tokenizer may have more ids (an added pad token, say)."""
        embedding = self.model.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        return embedding.num_embeddings

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.get_input_embeddings().weight.device  # pyright: ignore[reportReturnType]

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding and the hidden states."""
        return self.model.get_input_embeddings().weight.dtype  # pyright: ignore[reportReturnType]

    @property
    def lm_head(self) -> LMHead:
        """The language-model head with what this family does to its logits."""
        linear = self.model.get_output_embeddings()
        if linear is None or isinstance(linear, nn.Identity):
            raise ModelError(f"{type(self.model).__name__} has no language-model head")
        config = text_config(self.model.config)
        logits_scaling = getattr(config, "logits_scaling", None)
        return LMHead(
            weight=linear.weight,  # pyright: ignore[reportArgumentType]
            bias=getattr(linear, "bias", None),
            softcap=getattr(config, "final_logit_softcapping", None),
            scale=1.0 / logits_scaling if logits_scaling else getattr(config, "logit_scale", None) or 1.0,
        )

    def hidden_states(
        self,
        tokens: Int[Tensor, "b s"],
        attention_mask: Bool[Tensor, "b k"],
        *,
        adapter: str | None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b s h"]:
        """One trunk pass with `adapter` (None = LoRA off); the states after the decoder's final norm.

        With `cache` the tokens continue what the cache holds, and `attention_mask` covers both. Positions are counted
        from the first real token, so left padding does not move them.
        """
        positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        with self.switch.use(adapter):
            output = self.decoder(
                input_ids=tokens,
                attention_mask=attention_mask.long(),
                position_ids=positions,
                use_cache=cache is not None,
                **({} if cache is None else {self._cache_argument: cache}),
            )
        return output.last_hidden_state

    @property
    def _cache_argument(self) -> str:
        """`cache` since transformers 5.24, `past_key_values` before it and in a model's own code."""
        return "cache" if "cache" in inspect.signature(self.decoder.forward).parameters else "past_key_values"

    def add_adapter(
        self,
        name: str,
        *,
        rank: int,
        alpha: float,
        targets: tuple[str, ...],
        dtype: torch.dtype,
        seed_of: Callable[[str], int],
    ) -> None:
        """Add a LoRA set that changes nothing yet; `seed_of(path)` seeds each linear's A.

        All sets are on the same linears. Raises `ConfigError` for targets that the set below would not fit.
        """
        if not self.lora_linears:
            self.lora_linears = wrap_linears(self.decoder, self.switch, targets)
        elif self.switch.below and find_linears(self.decoder, targets).keys() != self.lora_linears.keys():
            names = sorted({path.rsplit(".", 1)[-1] for path in self.lora_linears})
            raise ConfigError(
                f"lora.targets={list(targets)}: the LoRA set that stage 1 left on this quantised base is on other "
                f"linears; use lora.targets=[{', '.join(names)}]"
            )
        for path, linear in self.lora_linears.items():
            generator = torch.Generator().manual_seed(seed_of(path))
            linear.add_adapter(name, rank=rank, alpha=alpha, dtype=dtype, generator=generator)

    def count_lora(self, rank: int, targets: tuple[str, ...]) -> int:
        """Numbers in one LoRA set of this rank on this trunk."""
        linears = {path: linear.linear for path, linear in self.lora_linears.items()}
        return sum(rank * sum(linear_features(m)) for m in (linears or find_linears(self.decoder, targets)).values())

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The tensors of one LoRA set as {path.lora_A | path.lora_B: parameter}."""
        parameters: dict[str, nn.Parameter] = {}
        for path, linear in self.lora_linears.items():
            parameters[f"{path}.lora_A"] = linear.lora_A[name]
            parameters[f"{path}.lora_B"] = linear.lora_B[name]
        return parameters

    def merge_adapter(self, name: str) -> None:
        """Turn `name` into part of the weights, once: a new base. Other adapters stay, on top of it."""
        assert self.quantized is None, "packed weights are never written; keep the adapter below instead"
        merge_into_linears(self.lora_linears, name)
        for linear in self.lora_linears.values():
            linear.drop_adapter(name)
        if not any(linear.scale for linear in self.lora_linears.values()):
            unwrap_linears(self.decoder, self.lora_linears)
            self.lora_linears = {}

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """The model's own parameters by their plain transformers names, adapters left out; tied ones once.

        Packed linears have none but their bias: see `base_tensors`.
        """
        return {
            self._plain_name(name): parameter
            for name, parameter in self.model.named_parameters()
            if not is_adapter(name)
        }

    def base_tensors(self) -> dict[str, Tensor]:
        """`base_parameters` and the buffers of packed linears: all that the base holds."""
        packed = {
            self._plain_name(f"{path}.{name}"): buffer
            for path, linear in self.model.named_modules()
            if isinstance(linear, QuantizedLinear)
            for name, buffer in linear.named_buffers()
        }
        return {**self.base_parameters(), **packed}

    def adopt_adapter(self, name: str) -> None:
        """Make `name` part of "LoRA off": merged into plain weights, kept below all others on packed ones."""
        if self.quantized is None:
            self.merge_adapter(name)
        elif name not in self.switch.below:
            self.keep_below(name)

    def keep_below(self, name: str) -> None:
        """Make `name` part of "LoRA off": it stays under every other adapter and learns no more."""
        self.switch.below = (*self.switch.below, name)
        for parameter in self.adapter_parameters(name).values():
            parameter.requires_grad_(False)

    @property
    def below_rank(self) -> int:
        """Rank of all that is kept below together; 0 = nothing."""
        any_linear = next(iter(self.lora_linears.values()), None)
        return 0 if any_linear is None else sum(len(any_linear.lora_A[name]) for name in self.switch.below)

    def enable_checkpointing(self, num_layers: int | None = None, *, offload: bool = False) -> None:
        """Recompute the first `num_layers` layers (None = all) in backward, with the adapters their forward captured.

        With `offload` what a recomputed layer keeps, its input, waits in pinned host memory.
        """
        for layer in self.layers()[:num_layers]:
            layer.adapter_switch = self.switch  # pyright: ignore[reportArgumentType]
            layer.offload = offload  # pyright: ignore[reportArgumentType]
            layer.forward = MethodType(checkpointed_forward, layer)

    def layers(self) -> list[nn.Module]:
        """The decoder's blocks, whatever the family calls them. Raises `ModelError` where they cannot be found."""
        num_layers = text_config(self.model.config).num_hidden_layers
        for module in self.decoder.modules():
            if isinstance(module, nn.ModuleList) and len(module) == num_layers:
                return list(module)
        raise ModelError(f"{type(self.model).__name__}: no list of {num_layers} layers; use memory.checkpointing=none")

    def drop_lm_head(self) -> None:
        """Free an untied head that no role of this trunk reads."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if isinstance(head, nn.Module) and head.weight is not embedding.weight:
            self.model.set_output_embeddings(nn.Identity())  # pyright: ignore[reportArgumentType]

    def plain_copy(self) -> "Trunk":
        """A deep copy in storage of its own, without adapters but those that are part of "LoRA off"."""
        duplicate = copy.deepcopy(self)
        for linear in duplicate.lora_linears.values():
            for name in linear.scale.keys() - set(self.switch.below):
                linear.drop_adapter(name)
        if not self.switch.below:
            unwrap_linears(duplicate.decoder, duplicate.lora_linears)
            duplicate.lora_linears = {}
        duplicate.model.requires_grad_(False)
        return duplicate

    def save(self, folder: Path) -> None:
        """Write a plain transformers folder (safetensors) that `AutoModelForCausalLM` loads; adapters are left out."""
        assert self.quantized is None, "packed weights are not written; save a merged copy, or the adapter"
        state = {
            self._plain_name(name): tensor for name, tensor in self.model.state_dict().items() if not is_adapter(name)
        }
        self.model.save_pretrained(folder, state_dict=state)

    def _plain_name(self, name: str) -> str:
        """The transformers name of a tensor, without the step into a LoRA linear."""
        path, wrapped, tensor = name.rpartition(".linear.")
        decoder_path = path.removeprefix(f"{self.model.base_model_prefix}.")
        return f"{path}.{tensor}" if wrapped and decoder_path in self.lora_linears else name


def is_adapter(name: str) -> bool:
    """True for the state-dict name of a LoRA tensor."""
    return ".lora_A." in name or ".lora_B." in name


def checkpointed_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A layer's forward that keeps its input only; a method, so that a copy of the layer recomputes the copy."""
    forward = type(self).forward
    if not torch.is_grad_enabled():
        return forward(self, *args, **kwargs)
    switch: AdapterSwitch = self.adapter_switch  # pyright: ignore[reportAssignmentType]
    contexts = switch.recompute_contexts
    with save_on_cpu(pin_memory=True) if self.offload else nullcontext():
        return checkpoint(partial(forward, self), *args, use_reentrant=False, context_fn=contexts, **kwargs)


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The decoder's own config where a multimodal family nests it."""
    return config.get_text_config(decoder=True)


def stop_token_ids(trunk: Trunk, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a response: the model's generation config, else the tokenizer's EOS. Raises `ModelError`."""
    ids = getattr(trunk.model.generation_config, "eos_token_id", None)
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        raise ModelError("neither the model nor its tokenizer names a stop token; set ppo.sampling.stop_token_ids")
    return (ids,) if isinstance(ids, int) else tuple(ids)  # pyright: ignore[reportReturnType]
