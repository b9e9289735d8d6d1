"""The table of row formats: what a row of each looks like, who reads it, and how a file's format is found. No torch."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from hydra_rlhf.data.published import (
    read_columns_of_text,
    read_dsp,
    read_hh_rlhf,
    read_oasst_tree,
    read_ranked_outputs,
    read_scored_list,
    read_tldr_comparisons,
    read_tldr_judged,
)
from hydra_rlhf.data.readers import (
    Reading,
    Row,
    read_alpaca,
    read_conversation,
    read_demonstration,
    read_instruction_pairs,
    read_labelled,
    read_pairs,
    read_prompt,
)
from hydra_rlhf.errors import ConfigError

Kind = Literal["pairs", "demonstrations", "prompts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One row format."""

    kind: Kind
    """What its records are."""
    fields: tuple[str, ...]
    """Fields a row must have; what tells formats apart, with `matches`."""
    optional: tuple[str, ...] = ()
    """Fields that are read if they are there; all others become `columns`."""
    read: Callable[[Row], Reading]
    """One row -> its records."""
    matches: Callable[[Row], bool] = lambda _: True
    """Further test on a row that has all `fields`, for detection."""
    description: str
    """One line for people."""

    def detects(self, row: Row) -> bool:
        """Whether `row` looks like this format."""
        return all(name in row for name in self.fields) and self.matches(row)


FORMATS: dict[str, Format] = {
    # Detection takes the first format that a row fits, so the more specific ones come first.
    "hh_rlhf": Format(
        kind="pairs",
        fields=("chosen", "rejected"),
        matches=lambda row: isinstance(row["chosen"], str) and re.match(r"\s*Human:", row["chosen"]) is not None,
        read=read_hh_rlhf,
        description="HH-RLHF: two whole transcripts with turns 'Human:' and 'Assistant:'",
    ),
    "instruction_pairs": Format(
        kind="pairs",
        fields=("instruction", "chosen", "rejected"),
        optional=("input",),
        read=read_instruction_pairs,
        description="an instruction (and an input) with a better and a worse response",
    ),
    "pairs": Format(
        kind="pairs",
        fields=("chosen", "rejected"),
        optional=("prompt",),
        read=read_pairs,
        description="prompt, chosen, rejected as text or messages; the prompt may be the messages both begin with",
    ),
    "labelled": Format(
        kind="pairs",
        fields=("prompt", "response_a", "response_b", "label"),
        read=read_labelled,
        description="two responses and which is better: label 0 or a, 1 or b, or tie",
    ),
    "dsp": Format(
        kind="pairs",
        fields=("text", "score"),
        matches=lambda row: isinstance(row["text"], list),
        read=read_dsp,
        description="DSP: a list of HH-RLHF transcripts and a list of their scores",
    ),
    "gpt4_llm_ranked": Format(
        kind="pairs",
        fields=("instruction", "output"),
        optional=("input",),
        matches=lambda row: isinstance(row["output"], list),
        read=read_ranked_outputs,
        description="an instruction (and an input) with outputs from best to worst",
    ),
    "gpt4_llm": Format(
        kind="pairs",
        fields=("user_input", "completion_a", "completion_b"),
        read=read_columns_of_text("user_input", "completion_a", "completion_b"),
        description="GPT-4-LLM comparison_data.json: completion_a is the better one",
    ),
    "gpt4_llm_scored": Format(
        kind="pairs",
        fields=("user_input", "responses_and_scores"),
        read=read_scored_list(("user_input",), "responses_and_scores", "response", ("score",)),
        description="GPT-4-LLM comparison_data_v2.json: responses with scores",
    ),
    "tldr_comparisons": Format(
        kind="pairs",
        fields=("info", "summaries", "choice"),
        read=read_tldr_comparisons,
        description="OpenAI summary comparisons (batch*.json): a post, two summaries, the choice of a person",
    ),
    "tldr_judged": Format(
        kind="pairs",
        fields=("query", "postprocessed_response", "reference_responses", "preferred"),
        read=read_tldr_judged,
        description="TL;DR posts with a model's summary and the author's, judged by a model",
    ),
    "stack_exchange": Format(
        kind="pairs",
        fields=("question", "response_j", "response_k"),
        read=read_columns_of_text("question", "response_j", "response_k"),
        description="Stack Exchange pairs: response_j is the better one",
    ),
    "stack_exchange_scored": Format(
        kind="pairs",
        fields=("question", "answers"),
        read=read_scored_list(("question",), "answers", "text", ("pm_score", "score")),
        description="Stack Exchange questions with scored answers",
    ),
    "oasst": Format(
        kind="pairs",
        fields=("prompt",),
        matches=lambda row: isinstance(row["prompt"], dict),
        read=read_oasst_tree,
        description="Open Assistant message trees with ranked replies",
    ),
    "ultrafeedback": Format(
        kind="pairs",
        fields=("completions",),
        optional=("instruction", "prompt"),
        matches=lambda row: "instruction" in row or "prompt" in row,
        # The fine-grained score comes first: some overall scores of the published set are 10 where 1 was meant.
        read=read_scored_list(
            ("instruction", "prompt"), "completions", "response", ("fine-grained_score", "overall_score", "score")
        ),
        description="UltraFeedback: an instruction with scored completions",
    ),
    "demonstrations": Format(
        kind="demonstrations",
        fields=("prompt", "response"),
        read=read_demonstration,
        description="prompt and response as text or messages",
    ),
    "conversations": Format(
        kind="demonstrations",
        fields=("messages",),
        read=read_conversation,
        description="messages whose last one, the assistant's, is the response",
    ),
    "alpaca": Format(
        kind="demonstrations",
        fields=("instruction", "output"),
        optional=("input",),
        matches=lambda row: not isinstance(row["output"], list),
        read=read_alpaca,
        description="Alpaca: an instruction (and an input) with one output",
    ),
    "prompts": Format(
        kind="prompts",
        fields=("prompt",),
        matches=lambda row: not isinstance(row["prompt"], dict),
        read=read_prompt,
        description="prompts alone, as text or messages",
    ),
}
"""Every row format by name, in the order of detection."""


def named_format(name: str) -> Format:
    """The format of this name; ConfigError with the nearest names otherwise."""
    if name in FORMATS:
        return FORMATS[name]
    near = get_close_matches(name, FORMATS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known formats: auto, {', '.join(FORMATS)}"
    raise ConfigError(f"data.format={name!r} is no known row format; {hint} (`hydra-rlhf data formats` lists all)")


def detect_format(rows: Iterable[Row], kinds: tuple[Kind, ...]) -> str | None:
    """The format that most of `rows` fit, among `kinds` in their order of preference; None if none fits any row."""
    names = sorted(
        FORMATS, key=lambda name: kinds.index(FORMATS[name].kind) if FORMATS[name].kind in kinds else len(kinds)
    )
    names = [name for name in names if FORMATS[name].kind in kinds]
    votes = Counter(next((name for name in names if FORMATS[name].detects(row)), None) for row in rows)
    del votes[None]
    return votes.most_common(1)[0][0] if votes else None


def describe_formats() -> str:
    """All formats with their fields, one a line, for people."""
    width = max(map(len, FORMATS))
    return "\n".join(
        f"{name:<{width}}  {FORMATS[name].description} ({', '.join(FORMATS[name].fields)})" for name in FORMATS
    )
