"""A recipe's data: read and checked before any weight is loaded, then turned into ids once the tokenizer is known."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra_rlhf.config import DataConfig
from hydra_rlhf.data import world
from hydra_rlhf.data.check import data_summary
from hydra_rlhf.data.formats import ChatFormat, TokenizedDemonstration, TokenizedPair, TokenizedPrompt
from hydra_rlhf.data.sources import (
    Demonstration,
    PreferencePair,
    Prompt,
    PromptValue,
    Rows,
    load_demonstrations,
    load_pairs,
    load_prompts,
    split_by_prompt,
    without_prompts_of,
)
from hydra_rlhf.data.world import WORLD as WORLD
from hydra_rlhf.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class RawData:
    """Every row a recipe uses, as text."""

    train: Rows[PreferencePair]
    test: Rows[PreferencePair]
    prompts: Rows[Prompt] | None
    """Prompt-only data for PPO, where the recipe names some."""
    demonstrations: Rows[Demonstration] | None
    """Demonstrations for plain SFT, where the recipe names some."""
    gold: Callable[[str, str], float] | None
    """The world's gold score; None on other data."""

    @property
    def ppo_prompts(self) -> list[Prompt]:
        """What PPO samples responses for."""
        return (self.train if self.prompts is None else self.prompts).prompts

    def texts(self) -> list[str]:
        """Training text for a scratch tokenizer."""
        return [text for pair in self.train.rows for text in (*prompt_texts(pair.prompt), pair.chosen, pair.rejected)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Datasets:
    """Every row a recipe uses, as ids."""

    train_pairs: Sequence[TokenizedPair]
    test_pairs: Sequence[TokenizedPair]
    demonstrations: Sequence[TokenizedDemonstration]
    """What plain SFT trains on: the named demonstrations, else the chosen responses."""
    train_prompts: Sequence[TokenizedPrompt]
    test_prompts: Sequence[TokenizedPrompt]
    summary: dict[str, Any] = field(default_factory=dict)
    """Content of data.json."""


def load_raw(config: DataConfig, *, seed: int) -> RawData:
    """Read and check every row. Raises `DataError` naming file and line, and where a split would be empty."""
    if config.train == WORLD:
        for name in ("test", "max_rows", "columns", "format"):
            if getattr(config, name) != getattr(DataConfig(), name):
                raise ConfigError(f"data.{name} means nothing with data.train=world; remove it, or name a file")
        train_pairs, test_pairs = world.world_pairs(config.world_pairs, seed, config.test_frac)
        read = len(train_pairs) + len(test_pairs)
        train = Rows(rows=train_pairs, source=WORLD, format=WORLD, rows_read=read)
        test = Rows(rows=test_pairs, source=WORLD, format=WORLD, rows_read=read)
    else:
        train = load_pairs(config.train, config, split=config.hub_split)
        if config.test is not None:
            test = load_pairs(config.test, config, split=config.hub_test_split)
            train = without_prompts_of(train, test)
        else:
            train, test = split_by_prompt(train, config.test_frac)
    if not train.rows or not test.rows:
        empty = "train" if not train.rows else "test"
        raise DataError(
            f"data: the {empty} split is empty ({len(train.rows)} train, {len(test.rows)} test rows of {config.train})"
            f"; give data.test or change data.test_frac={config.test_frac}"
        )
    prompts, demonstrations = None, None
    if config.prompts is not None:
        prompts = without_prompts_of(load_prompts(config.prompts, config, split=config.hub_split), test)
    if config.demonstrations is not None:
        rows = load_demonstrations(config.demonstrations, config, split=config.hub_split)
        demonstrations = without_prompts_of(rows, test)
    for name, extra in (("prompts", prompts), ("demonstrations", demonstrations)):
        if extra is not None and not extra.rows:
            raise DataError(f"data.{name}={extra.source}: no row is left whose prompt is not in the test split")
    gold = world.gold_score if config.train == WORLD else None
    return RawData(train=train, test=test, prompts=prompts, demonstrations=demonstrations, gold=gold)


def tokenize(raw: RawData, chat: ChatFormat) -> Datasets:
    """Ids of every row, with cuts counted in `summary`."""
    train_pairs, train_cuts = chat.tokenize_pairs(raw.train.rows)
    test_pairs, test_cuts = chat.tokenize_pairs(raw.test.rows)
    if not train_pairs or not test_pairs:
        raise DataError("no pair is left whose responses differ within data.max_response_tokens; raise it")
    train_prompts, prompt_cuts = chat.tokenize_prompts(raw.ppo_prompts)
    test_prompts, _ = chat.tokenize_prompts(raw.test.prompts)
    summary = {
        "train": data_summary(raw.train, cuts=train_cuts, tokenized=train_pairs),
        "test": data_summary(raw.test, cuts=test_cuts, tokenized=test_pairs),
    }
    if raw.prompts is not None:
        summary["prompts"] = data_summary(raw.prompts, cuts=prompt_cuts, tokenized=train_prompts)
    if raw.demonstrations is not None:
        demonstrations, cuts = chat.tokenize_demonstrations(raw.demonstrations.rows)
        summary["demonstrations"] = data_summary(raw.demonstrations, cuts=cuts, tokenized=demonstrations)
    else:
        demonstrations = [TokenizedDemonstration(pair.prompt_ids, pair.chosen_ids) for pair in train_pairs]
    return Datasets(
        train_pairs=train_pairs,
        test_pairs=test_pairs,
        demonstrations=demonstrations,
        train_prompts=train_prompts,
        test_prompts=test_prompts,
        summary=summary,
    )


def prompt_texts(prompt: PromptValue) -> list[str]:
    """The texts a prompt is made of."""
    return [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
