"""Warnings about memory: where it ran out, and where a phase needed more than was planned."""

from hydra_rlhf.reporting.record import Finding, RunRecord
from hydra_rlhf.reporting.tables import NBSP, format_bytes, format_count

MAX_ABOVE_PLAN = 0.1
"""Share by which a phase may measure more than the memory plan said."""
RETRIES = "memory/retries"
SETTING_OF = {"memory/micro_batch_tokens": "micro_batch_tokens", "memory/rollout_rows": "sampling.batch_rows"}
"""Metrics of a stage's limits, and the setting of the stage that each can be fixed by."""


def memory_ran_out(record: RunRecord) -> Finding | None:
    """Limits were halved, which costs the time of what was redone."""
    # The counter runs over a whole stage, and limits only ever shrink: their last values tell all.
    ends = {
        stage: {key: series.finite()[-1][1] for key in (RETRIES, *SETTING_OF) if (series := record.series(stage, key))}
        for stage in record.curves
    }
    ran_out = {stage: last for stage, last in ends.items() if last.get(RETRIES, 0.0) > 0}
    if not ran_out:
        return None
    counts = [f"{format_count(last[RETRIES])} in {stage}" for stage, last in ran_out.items()]
    settings = [
        f"{stage}.{SETTING_OF[key]} to {value:.0f}"
        for stage, last in ran_out.items()
        for key, value in last.items()
        if key in SETTING_OF
    ]
    ended = f"Set {' and '.join(settings)}, where the run ended, or name" if settings else "Name"
    return Finding(
        title="Memory ran out, and work was redone in smaller parts",
        text=f"Times a limit was halved: {', '.join(counts)}. Losses are the same; what was redone took its time.",
        remedy=f"{ended} what is really free in memory.budget.",
    )


def above_plan(record: RunRecord) -> Finding | None:
    """A phase measured clearly more than was planned."""
    above = []
    for phase, parts in record.plan.get(record.method or "", {}).items():
        measured, planned = record.measured_bytes(phase), sum(parts.values())
        if measured is not None and measured > (1 + MAX_ABOVE_PLAN) * planned:
            above.append(f"{phase} {format_bytes(measured)} measured, {format_bytes(planned)} planned")
    if not above:
        return None
    return Finding(
        title=f"A phase needed over {100 * MAX_ABOVE_PLAN:.0f}{NBSP}% more memory than was planned",
        text=f"{'; '.join(above)}.",
        remedy="Name a smaller memory.budget, so that work is cut finer; `hydra-rlhf plan --probe` measures one step "
        "and says by how much the plan is off here.",
    )
