"""Warnings in words: what a reader should know before trusting a run, and what to do about it.

The limits of the warnings are those of the "healthy" columns of docs/metrics.md.
"""

import math
import statistics
from collections.abc import Callable

from hydra_rlhf.model.roles import STAGE2
from hydra_rlhf.reporting.memory_findings import above_plan, memory_ran_out
from hydra_rlhf.reporting.record import Finding, RunRecord, Series
from hydra_rlhf.reporting.tables import (
    NBSP,
    format_count,
    format_interval,
    format_number,
    format_score,
    format_share,
)
from hydra_rlhf.reporting.training_findings import (
    judges_disagree,
    kl_explodes,
    source_falls,
    variety_falls,
    wins_by_length,
)

MIN_LOOKS = 4
"""Looks at held-out prompts before a fall between two of them is judged."""
MAX_KL = 20.0
"""Nats per response; beyond, the policy writes text that the reward was never trained on."""
LARGE_KL_REMEDY = {
    "ppo": "Raise ppo.kl_coef, set ppo.kl_target, or lower ppo.actor_learning_rate or ppo.num_epochs.",
    "preference": "Lower preference.learning_rate or preference.num_epochs; with dpo raise preference.dpo_beta.",
}
"""By the kind of stage 2."""
MIN_ENTROPY_SHARE = 0.3
"""Share of its starting entropy below which a policy counts as collapsed."""
MAX_LENGTH_DRIFT = 0.5
"""Relative change of the response length that needs an explanation."""
MIN_EOS_FRAC = 0.8
"""Share of responses that end by themselves; below, one in five is cut by the length limit."""
MAX_CLIP_FRAC = 0.3
"""Share of tokens held back by the clip; beyond, most of an update is thrown away."""
MIN_CRITIC_STEPS = 10
"""Steps a critic may take before it must beat a constant guess."""
MIN_ACCURACY_GAIN = 0.02
"""How much a reward model must rank better than "the longer response wins"."""
MAX_CUT_FRAC = 0.1
"""Share of rows that may lose response tokens, and with them their stop token."""


def find_problems(record: RunRecord) -> list[Finding]:
    """Everything the checks find, the gravest first."""
    return [found for check in CHECKS if (found := check(record)) is not None]


def _ends(series: Series | None) -> tuple[float, float] | None:
    """(start, end) of a series, where it has any finite value."""
    start, end = (series.start(), series.end()) if series else (None, None)
    return None if start is None or end is None else (start, end)


def _not_finite(record: RunRecord) -> Finding | None:
    bad = [
        f"{stage}: {key} at {len(found.steps) - len(found.finite())} of {len(found.steps)} steps"
        for stage, metrics in record.curves.items()
        for key, found in metrics.items()
        if len(found.finite()) < len(found.steps)
    ]
    if not bad:
        return None
    more = f" and {len(bad) - 6} more" if len(bad) > 6 else ""
    return Finding(
        title="Some logged values are not finite",
        text=f"{'; '.join(bad[:6])}{more}. Gaps in the curves are these values.",
        remedy="Lower the learning rates, clip scores with ppo.reward.clip, or use float32 where the base is bfloat16.",
    )


def _skipped_steps(record: RunRecord) -> Finding | None:
    # The counter runs over a whole stage, so its last value is the number of skipped steps.
    counts = {
        stage: series.finite()[-1][1]
        for stage in record.curves
        if (series := record.series(stage, "optim/skipped_steps"))
    }
    skipped = [f"{format_count(count)} in {stage}" for stage, count in counts.items() if count > 0]
    if not skipped:
        return None
    return Finding(
        title="Optimizer steps were skipped",
        text=f"Their loss or gradient was not finite: {', '.join(skipped)}.",
        remedy="A few early ones do no harm; otherwise lower that stage's learning rate, or set ppo.reward.clip.",
    )


def _gold_falls(record: RunRecord) -> Finding | None:
    summary = record.summary
    numbers = (summary.score_mean, summary.reference_score_mean, summary.gold_mean, summary.reference_gold_mean)
    text = None
    if all(value is not None for value in numbers):
        score, score_before, gold, gold_before = (value or 0.0 for value in numbers)
        interval = summary.gold_win_rate_ci
        chance = interval is not None and interval[1] >= 0.5  # gold may have fallen by which prompts were drawn
        if score > score_before and gold < gold_before and not chance:
            text = (
                f"From reference to actor, the mean score goes from {format_score(score_before)} to "
                f"{format_score(score)}, but gold from {format_score(gold_before)} to {format_score(gold)}."
            )
    scores, golds = record.series("ppo", "eval/score"), record.series("ppo", "eval/gold")
    if text is None and scores is not None and golds is not None and len(list(golds.finite())) >= MIN_LOOKS:
        gold_of, score_of = dict(golds.finite()), dict(scores.finite())
        peak, last = max(gold_of, key=lambda step: gold_of[step]), max(gold_of)
        drop, span = gold_of[peak] - gold_of[last], max(gold_of.values()) - min(gold_of.values())
        # Evaluations are samples: only a drop that is large beside the whole curve and beside the score itself counts.
        falls = drop > max(0.25 * span, 0.05 * abs(gold_of[peak]))
        if falls and score_of.get(last, -math.inf) >= score_of.get(peak, math.inf):
            text = (
                f"The held-out gold score peaked at {format_score(gold_of[peak])} in step {peak} and ended at "
                f"{format_score(gold_of[last])}, while the held-out score did not fall."
            )
    if text is None:
        return None
    return Finding(
        title="The score rises while gold falls: the reward model is being over-optimised",
        text=text,
        remedy="Raise ppo.kl_coef, set ppo.kl_target, take fewer ppo.num_steps, or give the reward model more pairs.",
    )


def _kl_is_off(record: RunRecord) -> Finding | None:
    ends = _ends(record.series("ppo", "kl/reference"))
    kl = record.summary.kl if record.summary.kl is not None else ends[1] if ends else 0.0
    if kl <= MAX_KL:
        return kl_explodes(record)
    return Finding(
        title=f"KL is above {MAX_KL:.0f} nats per response",
        text=f"The actor ends {format_number(kl)} nats from the reference; the reward saw no such text in training.",
        remedy=LARGE_KL_REMEDY[STAGE2.get(record.method or "", "ppo")],
    )


def _entropy_collapses(record: RunRecord) -> Finding | None:
    ends = _ends(record.series("ppo", "ppo/entropy"))
    if ends is None or ends[1] >= MIN_ENTROPY_SHARE * ends[0]:
        return None
    return Finding(
        title="Entropy is collapsing",
        text=f"It went from {format_number(ends[0])} to {format_number(ends[1])} nats per token: responses grow alike.",
        remedy="Raise ppo.kl_coef, lower ppo.actor_learning_rate, or give a small ppo.entropy_coef.",
    )


def _no_better(record: RunRecord) -> Finding | None:
    interval = record.summary.score_win_rate_ci
    if interval is None or interval[0] > 0.5:
        return None
    worse = interval[1] < 0.5
    return Finding(
        title=f"The actor {'loses to' if worse else 'is not shown to beat'} the reference on its own training score",
        text=f"The interval of its score win rate, {format_interval(interval)}, does not lie above 50{NBSP}%.",
        remedy="Evaluate on more prompts; raise ppo.num_steps or ppo.actor_learning_rate, or lower ppo.kl_coef.",
    )


def _reward_is_length(record: RunRecord) -> Finding | None:
    accuracy, floor = record.summary.reward_accuracy, record.summary.longer_wins_accuracy
    if accuracy is None or floor is None or accuracy >= floor + MIN_ACCURACY_GAIN:
        return None
    return Finding(
        title="The reward model ranks hardly better than “the longer response wins”",
        text=f"Accuracy {format_share(accuracy)} on held-out pairs; the length rule alone gets {format_share(floor)}.",
        remedy="More pairs or epochs in stage 1, a higher hydra_sft.reward_loss_coef, or a larger base.",
    )


def _length_drifts(record: RunRecord) -> Finding | None:
    before, after = record.summary.reference_response_tokens_mean, record.summary.response_tokens_mean
    ends = (before, after) if before and after else _ends(record.series("ppo", "response/tokens_mean"))
    if ends is None or ends[0] <= 0 or abs(ends[1] / ends[0] - 1) <= MAX_LENGTH_DRIFT:
        return None
    return Finding(
        title="Responses became much " + ("longer" if ends[1] > ends[0] else "shorter"),
        text=f"Mean length went from {format_number(ends[0])} to {format_number(ends[1])} tokens.",
        remedy="Compare reward accuracy with “longer wins”, and read the longest and shortest samples; "
        "raise ppo.kl_coef (preference.dpo_beta), or balance lengths in the preference data.",
    )


def _few_end(record: RunRecord) -> Finding | None:
    ends = _ends(record.series("ppo", "response/eos_frac"))
    frac = record.summary.eos_frac if record.summary.eos_frac is not None else ends[1] if ends else 1.0
    if frac >= MIN_EOS_FRAC:
        return None
    return Finding(
        title="Many responses do not end by themselves",
        text=f"Only {format_share(frac)} end in a stop token; the others are cut at the length limit.",
        remedy="Raise ppo.sampling.max_response_tokens, set ppo.reward.missing_eos_penalty, or check the stop tokens.",
    )


def _useless_critic(record: RunRecord) -> Finding | None:
    series = record.series("ppo", "ppo/explained_variance")
    has_critic = not record.roles or "critic" in record.roles
    if series is None or not has_critic or series.steps[-1] < MIN_CRITIC_STEPS:
        return None
    values = [value for _, value in series.finite()]
    # The median, because one step with hardly any variance in its returns can throw the share far below zero.
    last = statistics.median(values[len(values) - math.ceil(len(values) / 10) :])
    if last > 0:
        return None
    return Finding(
        title="The critic is no better than a constant",
        text=f"The median of its explained variance over the last tenth of the steps is {format_number(last)}; at 0 "
        "values say nothing, and below they add noise to the advantages.",
        remedy="Set ppo.critic_warmup_steps, raise ppo.critic_learning_rate or ppo.rollout_batch_size.",
    )


def _much_clipped(record: RunRecord) -> Finding | None:
    ends = _ends(record.series("ppo", "ppo/clip_frac"))
    if ends is None or ends[1] <= MAX_CLIP_FRAC:
        return None
    return Finding(
        title="The clip holds back much of each update",
        text=f"It ends at {format_share(ends[1])} of the tokens.",
        remedy="Lower ppo.actor_learning_rate or ppo.num_epochs, or set ppo.max_update_kl.",
    )


def _many_cut(record: RunRecord) -> Finding | None:
    shares = {
        split.name: split.cut.get("response_tokens_cut", 0.0) / split.rows_used
        for split in record.splits
        if split.rows_used
    }
    cut = [f"{format_share(share)} of {name}" for name, share in shares.items() if share > MAX_CUT_FRAC]
    if not cut:
        return None
    return Finding(
        title="Many responses in the data were cut",
        text=f"They lost tokens on the right, and with them the sign that they end: {', '.join(cut)}.",
        remedy="Raise data.max_response_tokens.",
    )


CHECKS: tuple[Callable[[RunRecord], Finding | None], ...] = (
    _not_finite,
    _gold_falls,
    judges_disagree,
    _kl_is_off,
    _entropy_collapses,
    variety_falls,
    _no_better,
    source_falls,
    _reward_is_length,
    wins_by_length,
    _length_drifts,
    _few_end,
    _useless_critic,
    _much_clipped,
    _skipped_steps,
    memory_ran_out,
    above_plan,
    _many_cut,
)
"""Every check, in the order in which warnings are shown."""
