"""Whether a model can read the data at all: ids within its embedding, and no more tokens than it has positions for."""

from collections.abc import Iterable, Sequence
from itertools import chain

from torch import nn

from hydra_rlhf.data.formats import TokenizedDemonstration, TokenizedPair, TokenizedPrompt
from hydra_rlhf.errors import ConfigError, ModelError
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.lora import check_rank
from hydra_rlhf.model.trunk import Trunk, text_config
from hydra_rlhf.stages.datasets import Datasets
from hydra_rlhf.stages.examples import Example, longest


def check_datasets(model: HydraModel, data: Datasets, max_response_tokens: int) -> None:
    """All that a run reads, and what it samples. Raises `ModelError` and `ConfigError`."""
    check_examples(model, [*data.train_pairs, *data.test_pairs])
    check_examples(model, data.demonstrations)
    check_prompts(model, [*data.train_prompts, *data.test_prompts], max_response_tokens)


def check_examples(model: HydraModel, examples: Sequence[Example]) -> None:
    """Training data. Raises `ModelError` for ids and `ConfigError` for lengths that the model has no room for."""
    if examples:
        check_ids(model, chain.from_iterable(parts_of(example) for example in examples))
        settings = "data.max_prompt_tokens or data.max_response_tokens"
        check_lengths(model, *longest(examples), of="response", settings=settings)


def check_prompts(model: HydraModel, prompts: Sequence[TokenizedPrompt], max_response_tokens: int) -> None:
    """Prompts to be answered with at most so many tokens, by LoRA sets of a rank that there is. Raises as
    `check_examples`."""
    adapted = [linear.linear for name in model.trunks for linear in model.trunk(name).lora_linears.values()]
    if adapted:
        check_rank(adapted, model.lora.rank)
    if prompts:
        check_ids(model, (prompt.prompt_ids for prompt in prompts))
        settings = "data.max_prompt_tokens or ppo.sampling.max_response_tokens"
        prompt = max(len(prompt.prompt_ids) for prompt in prompts)
        check_lengths(model, prompt, max_response_tokens, of="sampled response", settings=settings)


def check_ids(model: HydraModel, parts: Iterable[Sequence[int]]) -> None:
    """Raise `ModelError` where the tokenizer gives ids that the embedding has no row for."""
    highest = max(max(part, default=0) for part in parts)
    if highest >= model.vocab_size:
        raise ModelError(
            f"the tokenizer ({len(model.tokenizer)} tokens) gives id {highest}, but the model's embedding has "
            f"{model.vocab_size} rows; use the tokenizer that belongs to this model, or one without added tokens"
        )


def check_lengths(model: HydraModel, prompt: int, response: int, *, of: str, settings: str) -> None:
    """Raise `ConfigError` where the longest prompt with the longest response passes the positions learned."""
    known = learned_positions(model.trunk(next(iter(model.trunks))))
    if known is not None and prompt + response > known:
        raise ConfigError(
            f"this model has learned {known} positions, but the longest prompt ({prompt} tokens) with the longest {of} "
            f"({response}) takes {prompt + response}; lower {settings}"
        )


def learned_positions(trunk: Trunk) -> int | None:
    """Tokens that a family with learned positions has room for; None where positions are computed."""
    config, tokens = text_config(trunk.model.config), trunk.model.get_input_embeddings()
    most = getattr(config, "max_position_embeddings", None)
    tables = [m for m in trunk.decoder.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    # OPT keeps two rows in front of its first position.
    rows = [table.num_embeddings - getattr(table, "offset", 0) for table in tables]
    return most if most in rows else None


def parts_of(example: Example) -> tuple[Sequence[int], ...]:
    """All ids of an example."""
    if isinstance(example, TokenizedPair):
        return example.prompt_ids, example.chosen_ids, example.rejected_ids
    assert isinstance(example, TokenizedDemonstration)
    return example.prompt_ids, example.response_ids
