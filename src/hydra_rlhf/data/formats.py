"""Strings and messages -> token ids, the same way in training and in rollouts.

A prompt and its response are tokenised apart and joined, so the ids of a prompt do not depend on what answers it. The
response ends with the stop token; everything after the prompt is what losses count. Loads no torch and no transformers.

The plain template, for tokenizers without one of their own: messages are joined by blank lines, and the response
starts with a space::

    System: Answer briefly.

    User: What time do you close?

    Assistant: At six.<eos>

Tokenizers in the manner of SentencePiece put a word mark before every text they are given ("Prepend"), so there a
response always starts a new word, in every template, and no further space is added. Decoding takes the leading space
off again: `decode_response(encode_response(text))` is `text`. A sampled response that starts inside a word decodes as
it is; one that starts with a word mark loses that one space.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from hydra_rlhf.config import DataConfig
from hydra_rlhf.data.rows import Demonstration, Message, PreferencePair, Prompt, PromptValue
from hydra_rlhf.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["tokenizer", "plain", "none"]
SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant"}


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A preference pair as ids."""

    prompt_ids: list[int]
    """Prompt, its BOS or template included; at least one id."""
    chosen_ids: list[int]
    """Better response with its stop token (unless cut); at least one id."""
    rejected_ids: list[int]
    """Worse response with its stop token (unless cut); at least one id."""


@dataclass(frozen=True, slots=True)
class TokenizedDemonstration:
    """A demonstration as ids."""

    prompt_ids: list[int]
    """Prompt, its BOS or template included; at least one id."""
    response_ids: list[int]
    """Response with its stop token (unless cut); at least one id."""


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt as ids, with what reward functions and reports need."""

    prompt_ids: list[int]
    """Prompt, its BOS or template included; at least one id."""
    text: str
    """The prompt as the model reads it: with its template, and cut where the ids were."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The row's further fields."""
    original: PromptValue | None = None
    """The prompt as the data has it; None = `text`."""


@dataclass(slots=True)
class CutCounts:
    """How many rows lost tokens or were dropped for it."""

    prompt_tokens_cut: int = 0
    """Rows whose prompt lost tokens on the left."""
    response_tokens_cut: int = 0
    """Rows of which at least one response lost tokens on the right, and with them its stop token."""
    equal_after_cut: int = 0
    """Pairs dropped because their two responses were equal after the cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """One tokenizer with one template and the limits: all that turns text into ids and back. Made by `chat_format`."""

    tokenizer: "PreTrainedTokenizerBase"
    """Any fast or slow tokenizer; neither a pad token nor a template is needed."""
    template: Template
    """`tokenizer`: its own; `plain`: the one above; `none`: strings as they are."""
    eos_id: int
    """Id appended to every response of the data."""
    max_prompt_tokens: int
    """Longer prompts keep their last tokens (and a leading BOS)."""
    max_response_tokens: int
    """Longer responses keep their first tokens, stop token included in the count."""
    response_prefix: str
    """Put before a response: a space in the plain template unless the tokenizer puts its own word mark there."""
    adds_eos: bool
    """Whether the tokenizer closes every text with an EOS, which prompts must not have."""
    strips_space: bool
    """Whether the decoded text of a response has one leading space that its text has not."""

    def render_prompt(self, prompt: PromptValue) -> str:
        """The prompt as one string, up to where the response starts. DataError if the template refuses it."""
        if self.template == "none":
            return _bare_text(prompt)
        messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.template == "plain":
            turns = [f"{SPEAKERS[message['role']]}: {message['content']}" for message in messages]
            return "\n\n".join([*turns, "Assistant:"])
        try:
            conversation = [{"role": message["role"], "content": message["content"]} for message in messages]
            text = self.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates are Jinja programs of their authors and raise what they like
            raise DataError(
                f"the tokenizer's chat template refuses a prompt with the roles "
                f"{', '.join(message['role'] for message in messages)} ({error}); set data.chat_template=plain, or "
                "leave such rows out"
            ) from error
        assert isinstance(text, str)
        return text

    def encode_prompt(self, prompt: PromptValue) -> tuple[list[int], bool]:
        """(ids, cut): the last `max_prompt_tokens` ids of the rendered prompt; a BOS at the front is kept."""
        text = self.render_prompt(prompt)
        # A template writes its special tokens itself; elsewhere the tokenizer adds its own (mostly a BOS).
        own_tokens = self.template != "tokenizer"
        ids = list(self.tokenizer(text, add_special_tokens=own_tokens, verbose=False)["input_ids"])
        if own_tokens and self.adds_eos:
            ids = ids[:-1]  # else the model would take every prompt for finished
        if not ids:
            raise DataError(f"the tokenizer finds no tokens in the prompt {text[:60]!r}; remove the row")
        if len(ids) <= self.max_prompt_tokens:
            return ids, False
        if ids[0] == self.tokenizer.bos_token_id and self.max_prompt_tokens > 1:
            return [ids[0], *ids[len(ids) - self.max_prompt_tokens + 1 :]], True
        return ids[-self.max_prompt_tokens :], True

    def encode_response(self, text: str) -> tuple[list[int], bool]:
        """(ids, cut): the response and its stop token, or its first `max_response_tokens` ids.

        Special tokens written out in the text stay text, so the stop token is at the end and nowhere else.
        """
        ids = [*_text_ids(self.tokenizer, self.response_prefix + text), self.eos_id]
        return ids[: self.max_response_tokens], len(ids) > self.max_response_tokens

    def decode_response(self, ids: Sequence[int], stop_ids: Iterable[int]) -> str:
        """The text of sampled or encoded response ids, without the stop token and other special tokens."""
        ids = list(ids)
        if ids and ids[-1] in set(stop_ids):
            ids = ids[:-1]
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text.removeprefix(" ") if self.strips_space else text

    def tokenize_pairs(self, pairs: Iterable[PreferencePair]) -> tuple[list[TokenizedPair], CutCounts]:
        """Pairs as ids, in order; those that a cut made equal are dropped and counted."""
        counts = CutCounts()
        tokenized: list[TokenizedPair] = []
        for pair in pairs:
            prompt_ids, prompt_cut = self.encode_prompt(pair.prompt)
            chosen_ids, chosen_cut = self.encode_response(pair.chosen)
            rejected_ids, rejected_cut = self.encode_response(pair.rejected)
            if chosen_ids == rejected_ids:
                counts.equal_after_cut += 1
                continue
            counts.prompt_tokens_cut += prompt_cut
            counts.response_tokens_cut += chosen_cut or rejected_cut
            tokenized.append(TokenizedPair(prompt_ids, chosen_ids, rejected_ids))
        return tokenized, counts

    def tokenize_demonstrations(self, rows: Iterable[Demonstration]) -> tuple[list[TokenizedDemonstration], CutCounts]:
        """Demonstrations as ids, in order."""
        counts = CutCounts()
        tokenized: list[TokenizedDemonstration] = []
        for row in rows:
            prompt_ids, prompt_cut = self.encode_prompt(row.prompt)
            response_ids, response_cut = self.encode_response(row.response)
            counts.prompt_tokens_cut += prompt_cut
            counts.response_tokens_cut += response_cut
            tokenized.append(TokenizedDemonstration(prompt_ids, response_ids))
        return tokenized, counts

    def tokenize_prompts(self, rows: Iterable[Prompt]) -> tuple[list[TokenizedPrompt], CutCounts]:
        """Prompts as ids, in order, with the text that is left of them."""
        counts = CutCounts()
        tokenized: list[TokenizedPrompt] = []
        for row in rows:
            ids, cut = self.encode_prompt(row.prompt)
            counts.prompt_tokens_cut += cut
            text = self._cut_text(ids) if cut else self.render_prompt(row.prompt)
            tokenized.append(TokenizedPrompt(ids, text, row.columns, row.prompt))
        return tokenized, counts

    def _cut_text(self, ids: list[int]) -> str:
        without_bos = ids[1:] if ids[0] == self.tokenizer.bos_token_id else ids
        text = self.tokenizer.decode(without_bos, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def chat_format(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase", prompts: Iterable[Prompt], *, eos_id: int
) -> ChatFormat:
    """The one chat format of a run, from `config.chat_template`, the tokenizer and, for `auto`, the prompts.

    `auto` takes the tokenizer's own template if it has one, else `plain` if any prompt is messages, else `none`.
    """
    template: Template
    if config.chat_template == "tokenizer" or (config.chat_template == "auto" and tokenizer.chat_template):
        if not tokenizer.chat_template:
            raise ConfigError(
                "data.chat_template=tokenizer, but this tokenizer has no chat template; set data.chat_template=plain"
            )
        template = "tokenizer"
    elif config.chat_template == "auto":
        template = "plain" if any(isinstance(prompt.prompt, list) for prompt in prompts) else "none"
    else:
        template = config.chat_template
    # Asked of the tokenizer itself, because no attribute says it: does it put a word mark before a text, and does the
    # decoder give a space for it?
    first = tokenizer.convert_ids_to_tokens(_text_ids(tokenizer, "a"))[0]
    prefix = " " if template == "plain" and not first.startswith(("▁", "Ġ")) else ""
    decoded = tokenizer.decode(_text_ids(tokenizer, f"{prefix}a"), clean_up_tokenization_spaces=False)
    assert isinstance(decoded, str)
    return ChatFormat(
        tokenizer=tokenizer,
        template=template,
        eos_id=eos_id,
        max_prompt_tokens=config.max_prompt_tokens,
        max_response_tokens=config.max_response_tokens,
        response_prefix=prefix,
        adds_eos=tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id,
        strips_space=decoded.startswith(" "),
    )


def token_statistics(lengths: Sequence[int]) -> dict[str, int]:
    """Nearest-rank percentiles {p10, p50, p90, max} of some lengths; empty for none."""
    if not lengths:
        return {}
    ordered = sorted(lengths)
    # The k-th percentile is the smallest value that at least k % of the values do not exceed.
    ranks = {f"p{percent}": ordered[-(-percent * len(ordered) // 100) - 1] for percent in (10, 50, 90)}
    return {**ranks, "max": ordered[-1]}


def _text_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Ids of plain text: no special tokens added, none recognised."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])


def _bare_text(prompt: PromptValue) -> str:
    """A prompt without a template; ConfigError for a conversation, which needs one."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    raise ConfigError(
        f"data.chat_template=none takes strings as they are, but a prompt is a conversation of {len(prompt)} messages; "
        "set data.chat_template=plain"
    )
