"""Tiny random models of every supported family, and batches for them: what the contract tests run on."""

import copy
from dataclasses import replace

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from hydra_rlhf.config import DataConfig, LoraConfig, PPOConfig, SamplingConfig
from hydra_rlhf.data.formats import ChatFormat, TokenizedPrompt, chat_format
from hydra_rlhf.data.scratch_tokenizer import scratch_tokenizer
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.load import attention_implementation, to_dtype, without_dropout
from hydra_rlhf.model.roles import ROLES, methods_with, trunks
from hydra_rlhf.model.trunk import Trunk
from hydra_rlhf.records import TokenBatch

VOCAB = 300
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_LIKE = SHAPE | {"num_key_value_heads": 1, "intermediate_size": 24}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True),
    "opt": OPTConfig(**SHAPE, ffn_dim=24, word_embed_proj_dim=8, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "qwen3": Qwen3Config(**LLAMA_LIKE, head_dim=8, tie_word_embeddings=True),
    "gemma2": Gemma2Config(
        **LLAMA_LIKE,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=6,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=5.0,
    ),
    "mistral": MistralConfig(**LLAMA_LIKE, head_dim=8, sliding_window=6, tie_word_embeddings=False),
}
FAMILIES = list(CONFIGS)
METHODS = list(methods_with("ppo"))
LORA = LoraConfig(rank=2, alpha=4.0)


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of the models' vocabulary: <pad> 0, <bos> 1, <eos> 2."""
    return scratch_tokenizer(["the cat sat on the mat, the dog ran to the cat"] * 3, VOCAB)


def tiny_trunk(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Trunk:
    """A random model of a family; weights are spread enough that heads and layers matter."""
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[family])
    without_dropout(config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention_implementation(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return Trunk(to_dtype(model, dtype))


def tiny_hydra(
    method: str, family: str = "llama", dtype: torch.dtype = torch.float32, lora: LoraConfig = LORA
) -> HydraModel:
    """Every role of a method on one random model; reward heads are random and equal on all trunks."""
    base = tiny_trunk(family, dtype)
    table = ROLES[method]
    return HydraModel(table, {name: base.plain_copy() for name in trunks(table)}, tokenizer(), lora=lora)


def randomise_adapters(model: HydraModel, scale: float = 0.3) -> None:
    """Give every LoRA set an effect of its own, as training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, scale, generator=generator)


def ragged_batch(seed: int = 3) -> TokenBatch:
    """Four rows with prompts of 2 to 5 tokens (padded left) and responses of 1 to 6 (padded right)."""
    generator = torch.Generator().manual_seed(seed)
    prompt_lengths, response_lengths = [2, 5, 4, 3], [6, 1, 3, 5]
    p, r = max(prompt_lengths), max(response_lengths)
    tokens = torch.randint(3, VOCAB, (4, p + r), generator=generator)
    columns = torch.arange(p + r)
    starts = torch.tensor([p - n for n in prompt_lengths])[:, None]
    ends = torch.tensor([p + n for n in response_lengths])[:, None]
    mask = (columns >= starts) & (columns < ends)
    return TokenBatch(tokens=torch.where(mask, tokens, 0), attention_mask=mask, response_mask=mask[:, p:])


def alone(batch: TokenBatch, row: int) -> TokenBatch:
    """One row without any padding."""
    keep = batch.attention_mask[row]
    return TokenBatch(
        tokens=batch.tokens[row, keep][None],
        attention_mask=keep[keep][None],
        response_mask=batch.response_mask[row, batch.response_mask[row]][None],
    )


def with_garbage_padding(batch: TokenBatch) -> TokenBatch:
    """The same rows with other ids where nothing counts."""
    return replace(batch, tokens=torch.where(batch.attention_mask, batch.tokens, VOCAB - 1))


def chat(model: HydraModel) -> ChatFormat:
    """Strings as they are."""
    config = DataConfig(chat_template="none", max_prompt_tokens=16, max_response_tokens=16)
    return chat_format(config, model.tokenizer, [], eos_id=2)


def prompts(num: int = 6) -> list[TokenizedPrompt]:
    """Prompts of different lengths."""
    generator = torch.Generator().manual_seed(11)
    return [
        TokenizedPrompt([1, *torch.randint(3, VOCAB, (2 + i % 4,), generator=generator).tolist()], f"prompt {i}")
        for i in range(num)
    ]


def ppo_config(**changes: object) -> PPOConfig:
    """Two PPO steps of eight short responses."""
    settings: dict[str, object] = {
        "num_steps": 2,
        "rollout_batch_size": 8,
        "minibatch_size": 4,
        "num_epochs": 2,
        "micro_batch_tokens": 24,
        "actor_learning_rate": 1e-2,
        "critic_learning_rate": 1e-2,
        "value_head_learning_rate": 1e-2,
        "full_learning_rate_scale": 1.0,
        "warmup_frac": 0.0,
        "eval_every": 0,
        "sampling": SamplingConfig(max_response_tokens=6),
    }
    return PPOConfig(**(settings | changes))  # pyright: ignore[reportArgumentType]


def snapshot(model: HydraModel) -> dict[str, Tensor]:
    """A copy of every tensor, tied ones once."""
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
