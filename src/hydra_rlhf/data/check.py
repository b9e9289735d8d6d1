"""What a data file holds, before anything is trained on it: `hydra-rlhf data check FILE`, and the counts in data.json.

Imports no torch; a tokenizer is only looked at if one is given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_rlhf.config import DataConfig
from hydra_rlhf.data.formats import (
    ChatFormat,
    CutCounts,
    TokenizedDemonstration,
    TokenizedPair,
    TokenizedPrompt,
    chat_format,
    token_statistics,
)
from hydra_rlhf.data.row_formats import FORMATS
from hydra_rlhf.data.rows import Demonstration, PreferencePair, Prompt, PromptValue, Record, Rows
from hydra_rlhf.data.sources import read_rows
from hydra_rlhf.data.world import WORLD, world_pairs
from hydra_rlhf.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenized = Sequence[TokenizedPair] | Sequence[TokenizedDemonstration] | Sequence[TokenizedPrompt]
NUM_SHOWN_BAD_ROWS = 10
NUM_EXAMPLES = 3
LINE_WIDTH = 110


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """Everything `data check` shows about one file."""

    source: str
    """Path or hub name."""
    rows: Rows[Any] | None
    """What was read; None if the file cannot be read at all."""
    problem: str | None
    """Why no training could start from this file; None if it could."""
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)
    """Percentiles p10, p50, p90 and max by what is measured, e.g. `chosen, characters`."""
    longer_wins: float | None = None
    """Share of pairs whose longer response is the chosen one; None for other data."""
    cuts: CutCounts | None = None
    """Rows that lost tokens; None without a tokenizer."""

    @property
    def ok(self) -> bool:
        """Whether a run could use the file as it is."""
        return self.problem is None


def check_file(
    source: str | Path,
    config: DataConfig | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    split: str = "train",
    seed: int = 0,
) -> DataReport:
    """Read a file or hub data set as a run would, whatever it holds, and report instead of raising DataError.

    `world` is the built-in world, as `data.train` takes it: both its splits, drawn with `seed`. ConfigError for
    settings that are wrong in themselves (an unknown format, a column map that fits nothing).
    """
    config = config or DataConfig()
    try:
        if str(source) == WORLD:
            rows = world_rows(config, seed)
        else:
            rows = read_rows(source, config, ("pairs", "demonstrations", "prompts"), split=split)
    except DataError as error:
        return DataReport(source=str(source), rows=None, problem=str(error))
    problem = None
    if rows.bad_rows and config.on_bad_row == "error":
        problem = f"{len(rows.bad_rows)} bad rows; correct them, or set data.on_bad_row=skip to leave them out"
    elif not rows.rows:
        problem = f"none of the {rows.rows_read} rows can be used"
    lengths = _lengths(rows.rows, "characters", len) | _lengths(rows.rows, "words", lambda text: len(text.split()))
    cuts = None
    if tokenizer is not None and rows.rows:
        eos_id = tokenizer.eos_token_id if isinstance(tokenizer.eos_token_id, int) else 0
        chat = chat_format(config, tokenizer, rows.prompts, eos_id=eos_id)
        tokenized, cuts = _tokenize(rows, chat)
        prompts, responses = _token_lengths(tokenized)
        lengths |= {"prompt, tokens": token_statistics(prompts), "response, tokens": token_statistics(responses)}
    return DataReport(
        source=rows.source,
        rows=rows,
        problem=problem,
        lengths={name: statistics for name, statistics in lengths.items() if statistics},
        longer_wins=longer_wins(rows.rows),
        cuts=cuts,
    )


def world_rows(config: DataConfig, seed: int) -> Rows[PreferencePair]:
    """The pairs of the built-in world, training first."""
    train, test = world_pairs(config.world_pairs, seed, config.test_frac)
    made = (
        f"{WORLD}, the built-in one: data.world_pairs={config.world_pairs}, {len(test)} of them held out, seed={seed}"
    )
    return Rows(rows=[*train, *test], source=made, format="pairs", rows_read=len(train) + len(test))


def longer_wins(rows: Sequence[Record]) -> float | None:
    """Accuracy of always calling the response with more characters the better one, ties half; None without pairs.

    The floor under every reward accuracy on the same pairs: a model that only learned length reaches it.
    """
    pairs = [row for row in rows if isinstance(row, PreferencePair)]
    if not pairs:
        return None
    differences = [len(pair.chosen) - len(pair.rejected) for pair in pairs]
    return sum(1.0 if difference > 0 else 0.5 if difference == 0 else 0.0 for difference in differences) / len(pairs)


def data_summary(rows: Rows[Any], tokenized: Tokenized, cuts: CutCounts) -> dict[str, Any]:
    """One entry of a run's data.json: what was read, used, dropped and cut, and how long it is in tokens."""
    dropped = dict(rows.dropped)
    dropped |= {"bad_row": len(rows.bad_rows)} if rows.bad_rows else {}
    dropped |= {"equal_after_cut": cuts.equal_after_cut} if cuts.equal_after_cut else {}
    prompts, responses = _token_lengths(tokenized)
    return {
        "source": rows.source,
        "format": rows.format,
        "rows_read": rows.rows_read,
        "rows_used": len(tokenized),
        "dropped": dropped,
        "cut": {"prompt_tokens_cut": cuts.prompt_tokens_cut, "response_tokens_cut": cuts.response_tokens_cut},
        "longer_wins": longer_wins(rows.rows),
        "prompt_tokens": token_statistics(prompts),
        "response_tokens": token_statistics(responses),
    }


def verdict(report: DataReport) -> str:
    """What a run can use the file for, or what is wrong with it."""
    if report.problem is not None:
        return f"PROBLEM: {report.problem}"
    first = report.rows.rows[0] if report.rows is not None else None
    setting = {Demonstration: "data.demonstrations", Prompt: "data.prompts"}.get(type(first), "data.train")
    return f"ok: a run can use this as {setting}"


def render_report(report: DataReport) -> str:
    """The report as plain text, ready to print."""
    lines = [f"source       {report.source}"]
    if report.rows is not None:
        lines += _render_counts(report, report.rows)
        lines += _render_lengths(report.lengths)
        if report.longer_wins is not None:
            lines.append(
                f"longer wins  {100 * report.longer_wins:.1f} %  (always choosing the longer response; ties half)"
            )
        lines += _render_examples(report.rows.rows[:NUM_EXAMPLES])
    lines += ["", verdict(report)]
    return "\n".join(lines)


def _render_counts(report: DataReport, rows: Rows[Any]) -> list[str]:
    row_format = FORMATS[rows.format]
    dropped = ", ".join(f"{reason} {count}" for reason, count in rows.dropped.items()) or "none"
    lines = [
        f"format       {rows.format}: {row_format.description}",
        f"rows         {rows.rows_read} read -> {len(rows)} {row_format.kind}, {len(rows.prompts)} different prompts",
        f"dropped      {dropped}",
    ]
    if report.cuts is not None:
        lines.append(
            f"cut          {report.cuts.prompt_tokens_cut} rows lose prompt tokens, {report.cuts.response_tokens_cut} "
            f"response tokens; {report.cuts.equal_after_cut} pairs are equal after the cut and dropped"
        )
    lines.append(f"bad rows     {len(rows.bad_rows) or 'none'}")
    lines += [f"  {_one_line(str(bad), 3 * LINE_WIDTH)}" for bad in rows.bad_rows[:NUM_SHOWN_BAD_ROWS]]
    if len(rows.bad_rows) > NUM_SHOWN_BAD_ROWS:
        lines.append(f"  ... and {len(rows.bad_rows) - NUM_SHOWN_BAD_ROWS} more")
    return lines


def _render_lengths(lengths: dict[str, dict[str, int]]) -> list[str]:
    lines = [f"{'lengths':<24}" + "".join(f"{name:>8}" for name in ("p10", "p50", "p90", "max"))] if lengths else []
    return lines + [
        f"  {name:<22}" + "".join(f"{value:>8}" for value in statistics.values())
        for name, statistics in lengths.items()
    ]


def _render_examples(rows: Sequence[Record]) -> list[str]:
    lines = ["examples"] if rows else []
    for number, row in enumerate(rows, 1):
        for name, text in [("prompt", _prompt_text(row.prompt)), *_responses(row)]:
            lines.append(f"  {number} {name:<9} {_one_line(text)}")
    return lines


def _one_line(text: str, width: int = LINE_WIDTH) -> str:
    """`text` on one line of at most `width` characters, with control characters shown as escapes."""
    shown = "".join(
        char if char.isprintable() else {"\n": "\\n", "\t": "\\t"}.get(char, f"\\x{ord(char):02x}")
        for char in text[: width + 1]
    )
    return shown if len(shown) <= width else shown[: width - 3] + "..."


def _prompt_text(prompt: PromptValue) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _responses(row: Record) -> list[tuple[str, str]]:
    if isinstance(row, PreferencePair):
        return [("chosen", row.chosen), ("rejected", row.rejected)]
    return [("response", row.response)] if isinstance(row, Demonstration) else []


def _lengths(rows: Sequence[Record], unit: str, measure: Callable[[str], int]) -> dict[str, dict[str, int]]:
    """Percentiles of prompts (their messages' contents) and of each kind of response, by `<what>, <unit>`."""
    lengths: dict[str, list[int]] = {}
    for row in rows:
        contents = [row.prompt] if isinstance(row.prompt, str) else [turn["content"] for turn in row.prompt]
        lengths.setdefault(f"prompt, {unit}", []).append(sum(measure(content) for content in contents))
        for name, text in _responses(row):
            lengths.setdefault(f"{name}, {unit}", []).append(measure(text))
    return {name: token_statistics(values) for name, values in lengths.items()}


def _tokenize(rows: Rows[Any], chat: ChatFormat) -> tuple[Tokenized, CutCounts]:
    kind = FORMATS[rows.format].kind
    tokenize = {"pairs": chat.tokenize_pairs, "demonstrations": chat.tokenize_demonstrations}
    return tokenize.get(kind, chat.tokenize_prompts)(rows.rows)


def _token_lengths(tokenized: Tokenized) -> tuple[list[int], list[int]]:
    """(prompts, responses): how many ids each has; a pair counts its prompt once and both responses."""
    prompts = [len(row.prompt_ids) for row in tokenized]
    responses: list[int] = []
    for row in tokenized:
        if isinstance(row, TokenizedPair):
            responses += [len(row.chosen_ids), len(row.rejected_ids)]
        elif isinstance(row, TokenizedDemonstration):
            responses.append(len(row.response_ids))
    return prompts, responses
