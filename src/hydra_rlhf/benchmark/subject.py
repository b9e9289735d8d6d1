"""What is measured: a method's model, weights random or loaded; its prompts; the sizes that its work follows from."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers.configuration_utils import PretrainedConfig

from hydra_rlhf.benchmark.work import ModelSizes
from hydra_rlhf.config import LoraConfig, Recipe
from hydra_rlhf.config_checks import parse_bytes
from hydra_rlhf.data.formats import ChatFormat, TokenizedPrompt, chat_format
from hydra_rlhf.data.scratch_tokenizer import scratch_tokenizer
from hydra_rlhf.data.sources import load_prompts
from hydra_rlhf.errors import ConfigError
from hydra_rlhf.memory.measure import count_tensor_bytes
from hydra_rlhf.model.cache import cache_bytes
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.load import DTYPES
from hydra_rlhf.model.lora import find_linears, linear_features
from hydra_rlhf.model.roles import STAGE1_ORDER, method_table, trunks
from hydra_rlhf.model.shapes import SHAPE, find_config, random_trunk, with_layers
from hydra_rlhf.model.trunk import Trunk, text_config


def has_weights(path: str) -> bool:
    """Whether `model.path` names a model with weights, and not a shape alone (a folder with a config counts as one)."""
    folder = Path(path)
    if path.startswith((SHAPE, "scratch:")):
        return False
    return not folder.is_dir() or any(folder.glob("*.safetensors"))


def check_bench(recipe: Recipe) -> None:
    """Raise `ConfigError` for settings that a benchmark makes itself, or has no use for."""
    ppo = recipe.ppo
    if ppo.minibatch_size != num_sequences(recipe):
        raise ConfigError(
            f"ppo.minibatch_size={ppo.minibatch_size}, ppo.rollout_batch_size={ppo.rollout_batch_size}, "
            f"ppo.samples_per_prompt={ppo.samples_per_prompt}: a benchmark learns from all responses of a step in one "
            "minibatch; set --batch alone, to a multiple of ppo.samples_per_prompt"
        )
    if recipe.data.prompts is not None and not has_weights(recipe.model.path):
        raise ConfigError(
            f"--prompts {recipe.data.prompts} needs a tokenizer, and {recipe.model.path} is a shape without one; give "
            "--model with a folder or a hub name, or --prompt-tokens alone"
        )


def num_sequences(recipe: Recipe) -> int:
    """Sequences per PPO step."""
    return recipe.ppo.rollout_batch_size * recipe.ppo.samples_per_prompt


def with_batch(recipe: Recipe, num_sequences: int) -> Recipe:
    """The recipe with another number of sequences per PPO step, a multiple of those to one prompt."""
    num_prompts = num_sequences // recipe.ppo.samples_per_prompt
    return replace(recipe, ppo=replace(recipe.ppo, rollout_batch_size=num_prompts, minibatch_size=num_sequences))


def build_model(recipe: Recipe) -> HydraModel:
    """The recipe's method: every trunk of its table in storage of its own, with loaded weights or with random ones."""
    table = method_table(recipe)
    tile_bytes = parse_bytes(recipe.memory.logit_tile)
    if has_weights(recipe.model.path):
        return HydraModel.from_stage1(
            table,
            dict.fromkeys(STAGE1_ORDER, recipe.model.path),
            model=recipe.model,
            lora=recipe.lora,
            seed=recipe.seed,
            logit_tile_bytes=tile_bytes,
        )
    config = find_config(recipe.model)
    first, *others = trunks(table)
    base = random_trunk(with_layers(config, text_config(config).num_hidden_layers), recipe.model)
    by_name = {first: base} | {name: base.plain_copy() for name in others}
    tokenizer = scratch_tokenizer(["a b c"], 300)
    return HydraModel(table, by_name, tokenizer, lora=recipe.lora, seed=recipe.seed, logit_tile_bytes=tile_bytes)


def bench_prompts(recipe: Recipe, model: HydraModel) -> tuple[ChatFormat, list[TokenizedPrompt]]:
    """The prompts of `data.prompts`, or random ids of exactly `data.max_prompt_tokens` each, one for each sequence."""
    if recipe.data.prompts is not None:
        rows = load_prompts(recipe.data.prompts, recipe.data).rows
        chat = chat_format(recipe.data, model.tokenizer, rows, eos_id=model.eos_id)
        return chat, chat.tokenize_prompts(rows)[0]
    data = replace(recipe.data, chat_template="none")
    rng = torch.Generator().manual_seed(recipe.seed)
    shape = (recipe.ppo.rollout_batch_size, data.max_prompt_tokens)
    ids = torch.randint(3, model.vocab_size, shape, generator=rng).tolist()
    prompts = [TokenizedPrompt(row, str(number)) for number, row in enumerate(ids)]
    return chat_format(data, model.tokenizer, [], eos_id=model.eos_id), prompts


def mean_tokens(prompts: Sequence[TokenizedPrompt]) -> float:
    """Mean length of prompts."""
    return sum(len(prompt.prompt_ids) for prompt in prompts) / len(prompts)


def sizes_for_work(config: PretrainedConfig, trunk: Trunk, lora: LoraConfig) -> ModelSizes:
    """Read off a trunk without adapters, on the meta device or not."""
    text = text_config(config)
    linears = find_linears(trunk.decoder, ("all-linear",)).values()
    head = trunk.lm_head.weight
    num_lora = trunk.count_lora(lora.rank, lora.targets)
    num_heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // num_heads
    stored = sum(
        tensor.numel() * tensor.element_size()
        for linear in linears
        for tensor in (*linear.parameters(), *linear.buffers())
    )
    return ModelSizes(
        block_params=sum(rows * columns for rows, columns in map(linear_features, linears)),
        head_params=head.numel(),
        lora_params=num_lora,
        decode_bytes=stored + head.numel() * head.element_size(),
        lora_bytes=num_lora * DTYPES[lora.dtype].itemsize,
        num_layers=text.num_hidden_layers,
        query_width=num_heads * head_dim,
        cache_bytes=cache_bytes(
            num_rows=1,
            num_columns=1,
            num_layers=text.num_hidden_layers,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or num_heads,
            head_dim=head_dim,
            itemsize=trunk.dtype.itemsize,
        ),
    )


def held_bytes(model: HydraModel) -> int:
    """Bytes of all weights, adapters and heads, each storage once."""
    return count_tensor_bytes([*model.parameters(), *model.buffers()])
