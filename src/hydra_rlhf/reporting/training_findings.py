"""Warnings about where training is heading: they speak while a run is not finished, and of judges after it."""

import re

from hydra_rlhf.reporting.record import Finding, RunRecord
from hydra_rlhf.reporting.tables import format_interval, format_number, format_share

MIN_KL_STEPS = 12
"""Steps before the growth of the KL is judged: three in each quarter."""
MIN_EXPLODING_KL = 5.0
"""Nats per response below which a KL may grow as it likes: doubling from little is how every run begins."""
MAX_KL_GROWTH = 2.0
"""The last quarter's KL over that of the quarter before. Growing in proportion to the steps gives 7/5, and to their
square 37/19: beyond this the policy leaves the reference ever faster."""
MIN_VARIETY_SHARE = 0.5
"""Share of the reference's different word pairs below which the actor repeats itself."""
MEAN, STD = "reward/NAME_mean", "reward/NAME_std"
"""What is logged of each source of the reward; NAME is its name."""
SOURCE = re.compile(r"reward/([a-z0-9_]+)_mean")


def kl_explodes(record: RunRecord) -> Finding | None:
    """The KL grows ever faster, before it is large enough to be warned of for its level."""
    series = record.series("ppo", "kl/reference")
    values = [value for _, value in series.finite()] if series else []
    if len(values) < MIN_KL_STEPS:
        return None
    quarter = len(values) // 4
    before, last = (sum(part) / quarter for part in (values[-2 * quarter : -quarter], values[-quarter:]))
    if last < MIN_EXPLODING_KL or last <= MAX_KL_GROWTH * before:
        return None
    return Finding(
        title="KL is exploding",
        text=f"It averaged {format_number(before)} nats per response in the third quarter of the steps and "
        f"{format_number(last)} in the last: the actor leaves the reference ever faster.",
        remedy="Stop and go back to the best checkpoint; then raise ppo.kl_coef, set ppo.kl_target or "
        "ppo.max_update_kl, or lower ppo.actor_learning_rate.",
    )


def judges_disagree(record: RunRecord) -> Finding | None:
    """The score rose, and a judge prefers the start."""
    summary = record.summary
    rose = (
        summary.score_mean is not None
        and summary.reference_score_mean is not None
        and summary.score_mean > summary.reference_score_mean
    )
    against = [v for v in record.verdicts if v.interval is not None and v.interval[1] < 0.5]
    if not rose or not against:
        return None
    said = "; ".join(f"{v.judge} ({v.file}): {format_interval(v.interval)}" for v in against if v.interval is not None)
    return Finding(
        title="The score rises while a judge prefers the start: the reward model is being over-optimised",
        text=f"The mean score is above the reference's, but the actor's win rate lies below one half by {said}.",
        remedy="Read the samples with the largest score gain; raise ppo.kl_coef, take fewer ppo.num_steps, evaluate "
        "the best checkpoint (evaluation.checkpoint), or give the reward model more pairs.",
    )


def wins_by_length(record: RunRecord) -> Finding | None:
    """The actor wins, and at equal length it does not."""
    summary = record.summary
    for name, interval, controlled in (
        ("gold", summary.gold_win_rate_ci, summary.gold_length_controlled_win_rate),
        ("score", summary.score_win_rate_ci, summary.score_length_controlled_win_rate),
    ):
        if interval is not None and controlled is not None and interval[0] > 0.5 >= controlled:
            return Finding(
                title=f"The actor wins by the {name} through length alone",
                text=f"It wins {format_interval(interval)} of the prompts; at equal length {format_share(controlled)}.",
                remedy="Balance lengths in the preference data, or add a length source with a maximum to "
                "ppo.reward.sources; compare reward accuracy with “longer wins”.",
            )
    return None


def source_falls(record: RunRecord) -> Finding | None:
    """One source of the reward falls by more than its own spread while their sum rises."""
    score = record.series("ppo", "score/mean")
    sources = source_names(record)
    if score is None or len(sources) < 2 or (score.end() or 0.0) <= (score.start() or 0.0):
        return None
    falling = []
    for name in sources:
        mean, std = (record.series("ppo", key.replace("NAME", name)) for key in (MEAN, STD))
        if mean is None or std is None:
            continue
        start, end, spread = mean.start() or 0.0, mean.end() or 0.0, std.start() or 0.0
        if start - end > spread > 0:
            falling.append(f"{name} from {format_number(start)} to {format_number(end)}")
    if not falling:
        return None
    return Finding(
        title="One source of the reward falls while their sum rises",
        text=f"By more than its spread at the start: {', '.join(falling)}. The others pay for it.",
        remedy="Raise its weight in ppo.reward.sources, or normalise the sources, so that each weighs what it should.",
    )


def variety_falls(record: RunRecord) -> Finding | None:
    """The actor's responses are far more alike than the reference's."""
    before, after = record.summary.reference_distinct_2, record.summary.distinct_2
    if before is None or after is None or after >= MIN_VARIETY_SHARE * before:
        return None
    return Finding(
        title="Responses have become alike",
        text=f"Of all word pairs, {format_share(after)} are different; of the reference's, {format_share(before)}.",
        remedy="Raise ppo.kl_coef or ppo.entropy_coef, or add a repetition source to ppo.reward.sources.",
    )


def source_names(record: RunRecord) -> list[str]:
    """The sources of the reward that were logged, in the order of the log's keys."""
    found = (SOURCE.fullmatch(key) for key in record.curves.get("ppo", {}))
    return [match[1] for match in found if match is not None]
