"""A finished run that answers: actor and reference side by side, each token as it is drawn, with scores.

Both are drawn with the same random numbers, so where their texts part, it is the weights that parted them.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hydra_rlhf.config import Recipe, SamplingConfig
from hydra_rlhf.data.collate import collate_responses
from hydra_rlhf.data.formats import ChatFormat
from hydra_rlhf.data.rows import PromptValue
from hydra_rlhf.errors import ConfigError, DataError, OutOfMemoryError
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.stop_strings import StopStrings
from hydra_rlhf.model.stream import DrawnToken, stream_tokens
from hydra_rlhf.model.trunk import text_config
from hydra_rlhf.records import TokenBatch
from hydra_rlhf.runtime.randomness import uniforms
from hydra_rlhf.stages.finished import held_out_prompts, load_finished
from hydra_rlhf.stages.fits_model import check_ids
from hydra_rlhf.stages.limits import MemoryFailure, StageLimits, attempt
from hydra_rlhf.stages.rollout import score_roles

SPEAKERS = ("actor", "reference")
UNLIMITED = 1_000_000
"""Tokens of a prompt, for models that name no number of positions."""
HALF_CHARACTER = "\ufffd"
"""What decoding gives for bytes that are no character yet."""


@dataclass(slots=True, kw_only=True)
class Answer:
    """One role's response, filled in while it is drawn."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of its tokens, at the sampling temperature."""
    text: str = ""
    """What can be read so far: never the first half of a character."""
    ended: bool = False
    """Whether it came to a stop token or a stop string."""
    done: bool = False
    """Whether nothing will be added any more."""
    seconds: float = 0.0
    """Spent on it alone, the pass over the prompt included."""
    score: float | None = None
    """The reward head's; None before it is done, and where the method has no such head."""
    kl: float | None = None
    """Estimate k1 of KL(actor || reference) in nats, at the sampling temperature; the actor's response only."""

    @property
    def tokens_per_s(self) -> float:
        """Its speed, the pass over the prompt included."""
        return len(self.ids) / max(self.seconds, 1e-9)


@dataclass(slots=True, kw_only=True)
class Turn:
    """A prompt and the responses to it."""

    prompt: PromptValue
    """As it was asked; of a conversation, what is left of it."""
    prompt_ids: list[int]
    answers: dict[str, Answer]
    """By role, in the order they are shown."""
    number: int
    """How many were asked before; seeds the responses."""
    notices: list[str]
    """What was done to the prompt."""

    def as_dict(self) -> dict[str, Any]:
        """The turn for scripts."""
        return {
            "prompt": self.prompt,
            **{
                role: {
                    "response": answer.text,
                    "score": answer.score,
                    "tokens": len(answer.ids),
                    "ended": answer.ended,
                    "tokens_per_s": round(answer.tokens_per_s, 1),
                }
                for role, answer in self.answers.items()
            },
            "kl": next((answer.kl for answer in self.answers.values() if answer.kl is not None), None),
            "notices": self.notices,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Speakers:
    """The roles of a run that answer, and how."""

    model: HydraModel
    chat: ChatFormat
    limits: StageLimits
    recipe: Recipe
    """What the run was trained with."""
    checkpoint: str
    """Which policy answers, in words."""
    sampling: SamplingConfig
    """How responses are drawn here."""
    seed: int

    @property
    def roles(self) -> tuple[str, ...]:
        """Who answers: actor and reference, as far as the method has them."""
        return tuple(role for role in SPEAKERS if role in self.model.table)

    @property
    def takes_conversations(self) -> bool:
        """Whether prompts may be messages: where a template renders them."""
        return self.chat.template != "none"

    def changed(self, *, temperature: float | None = None, max_tokens: int | None = None) -> "Speakers":
        """The same at another temperature (0 = the likeliest token, always) or response length. Raises `ConfigError`
        where the model has no room for such responses."""
        sampling = self.sampling
        if temperature == 0:  # log-probs are then those at 1
            sampling = replace(sampling, temperature=1.0, top_k=1)
        elif temperature is not None:
            sampling = replace(sampling, temperature=temperature, top_k=self.recipe.ppo.sampling.top_k)
        if max_tokens is not None:
            positions = num_positions(self.model)
            if positions is not None and max_tokens >= positions:
                raise ConfigError(
                    f"responses of {max_tokens} tokens do not fit this model, which has {positions} positions for a "
                    f"prompt and its response; choose less, with --max-tokens or /max-tokens"
                )
            sampling = replace(sampling, max_response_tokens=max_tokens)
        return replace(self, sampling=sampling)

    def begin(self, prompt: PromptValue, number: int) -> Turn:
        """A turn in which nothing has been said yet. What the model has no room for is left out, with a notice: the
        oldest messages, or the beginning of a single one. Raises `DataError` and `ModelError`."""
        check_text(prompt)
        positions = num_positions(self.model)
        room = UNLIMITED if positions is None else positions - self.sampling.max_response_tokens
        chat = replace(self.chat, max_prompt_tokens=room)
        ids, cut = chat.encode_prompt(prompt)
        dropped = 0
        while cut and not isinstance(prompt, str) and len(prompt) > 1:
            shorter = without_oldest(prompt)
            dropped, prompt = dropped + len(prompt) - len(shorter), shorter
            ids, cut = chat.encode_prompt(prompt)
        check_ids(self.model, [ids])
        because = f"the model has room for {room} tokens before a response"
        notices = [f"{dropped} of the oldest messages left out: {because}"] if dropped else []
        notices += [f"the beginning of the prompt was cut off: {because}"] if cut else []
        answers = {role: Answer() for role in self.roles}
        return Turn(prompt=prompt, prompt_ids=ids, answers=answers, number=number, notices=notices)

    def rounds(self, turn: Turn) -> Iterator[None]:
        """Let all who have not ended say one more token each, until nobody is left. Stop iterating to stop them."""
        stop_ids = self.model.stop_ids(self.sampling.stop_token_ids)
        stop_strings = StopStrings(self.sampling.stop_strings, partial(self.chat.decode_response, stop_ids=()))
        draws = uniforms(self.sampling.max_response_tokens, self.seed, "chat", turn.number)
        talking = {
            role: stream_tokens(
                self.model.trunk(self.model.table[role].trunk),
                self.model.table[role].adapter,
                turn.prompt_ids,
                draws,
                self.sampling,
                stop_ids=stop_ids,
                stop_strings=stop_strings if self.sampling.stop_strings else None,
                tile_bytes=self.model.logit_tile_bytes,
            )
            for role in turn.answers
        }
        while talking:
            for role, tokens in list(talking.items()):
                answer, began = turn.answers[role], time.perf_counter()
                token = attempt(next_token, tokens)
                answer.seconds += time.perf_counter() - began
                if isinstance(token, MemoryFailure):
                    raise OutOfMemoryError(
                        f"memory ran out on a prompt of {len(turn.prompt_ids)} tokens and up to {len(draws)} more; "
                        f"begin anew with /reset, or lower --max-tokens ({token.reason})"
                    )
                if token is not None:
                    answer.ids.append(token.id)
                    answer.logprobs.append(token.logprob)
                    answer.ended = token.is_stop
                if token is None or token.is_stop:
                    del talking[role]
                answer.text = stop_strings.cut(self.chat.decode_response(answer.ids, stop_ids))
                if role in talking:  # the next token may complete it
                    answer.text = answer.text.rstrip(HALF_CHARACTER)
            yield

    def examples(self) -> list[PromptValue]:
        """The run's held-out prompts as its data has them; reads the data."""
        prompts = held_out_prompts(self.recipe, self.chat)
        return [prompt.text if prompt.original is None else prompt.original for prompt in prompts]

    def judge(self, turn: Turn) -> None:
        """End the turn: fill in what the reward head says of each response, and the KL of the actor's."""
        for answer in turn.answers.values():
            answer.done = True
        looking = [role for role in ("reference", "reward") if role in self.model.table]
        spoken = [role for role, answer in turn.answers.items() if answer.ids]
        if not looking or not spoken:
            return
        batch = collate_responses(
            [turn.prompt_ids for _ in spoken], [turn.answers[role].ids for role in spoken], self.model.pad_id
        )
        on_device = TokenBatch(
            tokens=batch.tokens.to(self.model.device),
            attention_mask=batch.attention_mask.to(self.model.device),
            response_mask=batch.response_mask.to(self.model.device),
        )
        temperature = self.sampling.temperature
        scored = score_roles(self.model, on_device, looking, temperature=temperature, limits=self.limits)
        for row, role in enumerate(spoken):
            answer = turn.answers[role]
            if "reward" in looking:
                answer.score = scored.scores[row].item()
            if role == "actor" and "reference" in looking:
                theirs = scored.ref_logprobs[row, : len(answer.ids)].double().cpu()
                answer.kl = (torch.tensor(answer.logprobs, dtype=torch.float64) - theirs).sum().item()


def open_speakers(
    folder: Path,
    *,
    checkpoint: str,
    temperature: float | None,
    max_tokens: int | None,
    seed: int,
    trust_remote_code: bool = False,
) -> Speakers:
    """A finished run, ready to answer; what is not given is as in its PPO. Raises `CheckpointError`, `ConfigError`."""
    finished = load_finished(folder, checkpoint, trust_remote_code=trust_remote_code)
    recipe = finished.run.recipe
    sampling = recipe.ppo.sampling
    speakers = Speakers(
        model=finished.model,
        chat=finished.chat,
        limits=finished.limits,
        recipe=recipe,
        checkpoint=finished.checkpoint,
        sampling=sampling,
        seed=seed,
    )
    return speakers.changed(temperature=temperature, max_tokens=max_tokens or sampling.max_response_tokens)


def next_token(tokens: Iterator[DrawnToken]) -> DrawnToken | None:
    """The next one; None at the end."""
    return next(tokens, None)


def num_positions(model: HydraModel) -> int | None:
    """Tokens that all trunks can read, learned or computed positions alike; None where no config names a number."""
    configs = [text_config(model.trunk(name).model.config) for name in model.trunks]
    known = [getattr(config, "max_position_embeddings", None) for config in configs]
    return min((number for number in known if number), default=None)


def without_oldest(messages: PromptValue) -> PromptValue:
    """A conversation without its oldest exchange: up to the next message of the user. The system's message stays."""
    assert not isinstance(messages, str)
    kept = [message for message in messages[:1] if message["role"] == "system"]
    rest = messages[len(kept) :]
    starts = [place for place, message in enumerate(rest) if message["role"] == "user" and place > 0]
    return [*kept, *rest[starts[0] :]] if starts else rest[-1:]


def check_text(prompt: PromptValue) -> None:
    """Raise `DataError` for bytes that were no text: Python hands them over as halves of a pair, which no tokenizer
    takes."""
    for text in [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the prompt {text[:60]!r} is not UTF-8; convert it") from error
