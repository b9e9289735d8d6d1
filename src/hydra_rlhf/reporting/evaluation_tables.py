"""Held-out numbers with their intervals, and what judges said: the tables of an evaluation."""

from hydra_rlhf.reporting.record import Interval, RunRecord
from hydra_rlhf.reporting.tables import (
    Table,
    format_count,
    format_interval,
    format_number,
    format_score,
    format_share,
)

SHARES = (
    ("Gold win rate", "gold_win_rate"),
    ("Gold win rate at equal length", "gold_length_controlled_win_rate"),
    ("Score win rate", "score_win_rate"),
    ("Score win rate at equal length", "score_length_controlled_win_rate"),
    ("Reward accuracy", "reward_accuracy"),
    ("Calibration error", "calibration_error"),
)
"""Numbers of the summary that are shares with an interval: (words, key)."""
BOTH = (
    ("Mean score", "score_mean", format_score),
    ("Mean gold score", "gold_mean", format_score),
    ("Response length, tokens", "response_tokens_mean", format_number),
    ("Different words, of all", "distinct_1", format_share),
    ("Different word pairs, of all", "distinct_2", format_share),
)
"""Numbers of actor and reference: (words, key, how they are written)."""


def evaluation_table(record: RunRecord) -> Table | None:
    """Every held-out share with its 95 % interval; None where there is none."""
    rows = [
        (words, format_share(value), "–" if (ends := _interval(record, key)) is None else format_interval(ends))
        for words, key in SHARES
        if (value := getattr(record.summary, key)) is not None
    ]
    if not rows:
        return None
    count = record.summary.num_prompts
    title = "Held out" if count is None else f"Held out, {format_count(count)} prompts"
    return Table(title=title, columns=("", "Share", "95 %"), rows=tuple(rows))


def sides_table(record: RunRecord) -> Table | None:
    """What actor and reference came to, side by side; None where neither is known."""
    rows = [
        (words, write(before), write(after))
        for words, key, write in BOTH
        if (after := getattr(record.summary, key)) is not None
        and (before := getattr(record.summary, f"reference_{key}")) is not None
    ]
    return Table(title="Before and after", columns=("", "Reference", "Actor"), rows=tuple(rows)) if rows else None


def verdicts_table(record: RunRecord) -> Table | None:
    """Win rates of the actor over its start by each judge of `hydra-rlhf eval`; None where nobody was asked."""
    rows = [
        (
            verdict.judge,
            verdict.file,
            format_share(verdict.rate),
            "–" if verdict.interval is None else format_interval(verdict.interval),
            format_share(verdict.controlled_rate),
            "–" if verdict.controlled_interval is None else format_interval(verdict.controlled_interval),
        )
        for verdict in record.verdicts
    ]
    columns = ("Judge", "File", "Actor wins, ties half", "95 %", "At equal length", "95 %")
    return Table(title="Judges, actor against its start", columns=columns, rows=tuple(rows)) if rows else None


def _interval(record: RunRecord, key: str) -> Interval | None:
    return getattr(record.summary, f"{key}_ci")
