"""What is judged: prompts as a judge reads them, and each player's answers to them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra_rlhf.data.formats import SPEAKERS
from hydra_rlhf.data.rows import PromptValue, prompt_key
from hydra_rlhf.records import Rollout
from hydra_rlhf.stages.datasets import RawData, prompt_texts
from hydra_rlhf.stages.rollout import sequence_kl


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """Held-out prompts, whole and without any run's template."""

    prompts: Sequence[PromptValue]
    """As in the data."""
    columns: Sequence[dict[str, Any]]
    """Each row's further fields, for rules."""
    references: Sequence[str]
    """Each prompt's chosen response in the data (of the first pair that has the prompt)."""

    @property
    def texts(self) -> list[str]:
        """The prompts as one string each; of a conversation every turn with its speaker."""
        return [as_text(prompt) for prompt in self.prompts]

    @property
    def bare_texts(self) -> list[str]:
        """The prompts' words alone, as the world's gold score reads them."""
        return ["".join(prompt_texts(prompt)) for prompt in self.prompts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """One response to every question, from one policy."""

    player: str
    """Who answers; several runs (seeds) may be one player."""
    run: str
    """The run folder the policy is from."""
    checkpoint: str
    """Which policy of the run, in words."""
    texts: Sequence[str]
    """The responses, without the stop token."""
    ended: Sequence[bool]
    """Whether each response ended in a stop token."""
    num_tokens: Sequence[int]
    """Tokens of each response, by the run's own tokenizer."""
    kl: float | None = None
    """KL from the run's reference in nats per response, where it is known."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Further numbers about how the answers came to be."""


def questions_of(raw: RawData, num_prompts: int) -> Questions:
    """The first held-out prompts of a run's data, each once, as `RawData.test.prompts` orders them."""
    rows = raw.test.prompts[:num_prompts]
    chosen: dict[str, str] = {}
    for pair in raw.test.rows:
        chosen.setdefault(prompt_key(pair.prompt), pair.chosen)
    return Questions(
        prompts=[row.prompt for row in rows],
        columns=[row.columns for row in rows],
        references=[chosen[prompt_key(row.prompt)] for row in rows],
    )


def answers_of(rollout: Rollout, *, player: str, run: str, checkpoint: str, is_actor: bool) -> Answers:
    """The answers of a rollout with one response per prompt."""
    return Answers(
        player=player,
        run=run,
        checkpoint=checkpoint,
        texts=rollout.responses,
        ended=rollout.ended.tolist(),
        num_tokens=rollout.batch.response_mask.sum(dim=1).tolist(),
        kl=sequence_kl(rollout).mean().item() if is_actor else None,
    )


def as_text(prompt: PromptValue) -> str:
    """A prompt as one string: as it is, or its turns with their speakers, apart by blank lines."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{SPEAKERS[message['role']]}: {message['content']}" for message in prompt)
