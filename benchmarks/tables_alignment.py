"""The tables of docs/results.md that come from results/alignment_study.json and results/hydra_sft_study.json."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tables_memory import MIB, markdown

SUBJECT = "hydra-ppo"
"""Whom the others are compared with."""
CI = "[95 %]"
SHOWN_WARNINGS = 3


def with_interval(found: Mapping[str, Any], digits: int = 2) -> str:
    """A mean and its interval."""
    return interval(found["mean"], found["ci"], digits)


def interval(mean: float, ci: Sequence[float] | None, digits: int = 2) -> str:
    """A number with an interval around it, where there is one."""
    return f"{mean:.{digits}f}" + ("" if ci is None else f" [{ci[0]:.{digits}f}, {ci[1]:.{digits}f}]")


def bars(part: Mapping[str, Any]) -> str:
    """What was to be shown, and whether it was."""
    rows = [
        (
            row["what"],
            row["bar"].replace("-", "−"),
            f"{row['found']:.3f}".replace("-", "−"),
            "yes" if row["holds"] else "**no**",
        )
        for row in part["bars"]
    ]
    return markdown(("what", "bar", "found", "holds"), rows)


def methods(part: Mapping[str, Any]) -> str:
    """Every system: gold, KL, what it cost. The best of many by gold first."""
    ordered = sorted(part["methods"].items(), key=lambda item: -item[1]["gold_mean"])
    rows = [
        (
            f"`{name}`",
            "–" if found["start"] is None else interval(found["gold_win_rate_vs_start"], found["ci"]),
            interval(found["gold_mean"], found["gold_mean_ci"]),
            f"{found['kl']:.1f}",
            "–" if found["seconds"] is None else f"{found['seconds']:.0f}",
            "–" if found["peak_bytes"] is None else f"{found['peak_bytes'] / MIB:,.0f} MiB",
        )
        for name, found in ordered
    ]
    columns = (
        "system",
        f"gold win rate against its start {CI}",
        f"mean gold, 0 to 10 {CI}",
        "KL, nats",
        "seconds of training",
        "peak resident memory",
    )
    return markdown(columns, rows)


def round_robin(part: Mapping[str, Any]) -> str:
    """Mean win rates in %: of everybody against everybody, and of the rows of the paper's table among themselves."""
    small = part["table_3"] or {}
    ordered = sorted(part["round_robin"].items(), key=lambda item: -item[1]["mean"])
    rows = [(f"`{name}`", percent(found), percent(small.get(name))) for name, found in ordered]
    return markdown(("system", f"against all others, % {CI}", f"the rows of Table 3 alone, % {CI}"), rows)


def percent(found: Mapping[str, Any] | None) -> str:
    """A rate in %."""
    if found is None:
        return ""
    return interval(100 * found["mean"], [100 * end for end in found["ci"]], digits=1)


def head_to_head(part: Mapping[str, Any]) -> str:
    """The subject against everybody by gold, with what is significant and what is not."""
    pairs = {
        name.partition("/")[2]: found
        for name, found in part["head_to_head"].items()
        if name.partition("/")[0] == SUBJECT
    }
    rows = [
        (
            f"`{other}`",
            with_interval(found),
            interval(found["gold_difference"], found["gold_difference_ci"]),
            verdict(found),
        )
        for other, found in sorted(pairs.items(), key=lambda item: -item[1]["mean"])
    ]
    columns = (f"`{SUBJECT}` against", f"gold win rate {CI}", f"difference in mean gold {CI}", "at 95 %")
    return markdown(columns, rows)


def verdict(found: Mapping[str, Any]) -> str:
    """A comparison in one word."""
    if not found["significant"]:
        return "not significant"
    return "better" if found["mean"] > 0.5 else "worse"


def price_of_a_critic(part: Mapping[str, Any]) -> str:
    """The subject against the methods without a critic at equal samples, at equal seconds, and in memory."""
    ours = part["methods"][SUBJECT]
    rows = []
    for pair, equal in part["equal_seconds"].items():
        other = pair.partition("/")[2]
        theirs, found = part["methods"][other], part["head_to_head"][pair]
        rows.append(
            (
                f"`{other}`",
                interval(found["gold_difference"], found["gold_difference_ci"]),
                f"{with_interval(equal['difference'])} at {equal['seconds']:.0f} s",
                f"{ours['seconds'] / theirs['seconds']:.2f} x",
                f"{ours['peak_bytes'] / theirs['peak_bytes']:.3f} x",
            )
        )
    columns = (
        f"`{SUBJECT}` against",
        f"gold, equal samples {CI}",
        f"gold, equal seconds {CI}",
        "seconds",
        "peak resident memory",
    )
    return markdown(columns, rows)


def over_optimisation(part: Mapping[str, Any]) -> str:
    """Gold and learned score where gold peaked and at the end, with and without KL, and the first warning."""
    rows = [
        (
            label if place == 0 else "",
            str(seen["seed"]),
            f"{seen['gold_start']:.1f} → {seen['gold_peak']:.1f} → {seen['gold_end']:.1f}",
            f"{seen['score_start']:.1f} → {seen['score_at_peak']:.1f} → {seen['score_end']:.1f}",
            f"{seen['peak_step']} / {seen['fall_step'] or '–'}",
            f"{seen['kl_end']:.0f}",
            first_warnings(seen["warnings"]),
        )
        for label, run in part["runs"].items()
        for place, seen in enumerate(run["per_seed"])
    ]
    columns = (
        "run",
        "seed",
        "gold: first look → peak → end",
        "learned score, same looks",
        "gold's peak / fall at step",
        "KL at the end, nats",
        "first warnings of the report, with their steps",
    )
    picture = "![Gold against KL, and gold beside the learned score](../benchmarks/results/alignment_study.svg)"
    return f"{markdown(columns, rows)}\n\n{picture}"


def first_warnings(warnings: Mapping[str, int]) -> str:
    """The warnings that come first, with their steps."""
    ordered = sorted(warnings.items(), key=lambda item: item[1])
    return "; ".join(f"{step}: {title}" for title, step in ordered[:SHOWN_WARNINGS]) or "none"


def hydra_sft(part: Mapping[str, Any]) -> str:
    """Joined against separate stage 1."""
    rows = [
        (
            name,
            with_interval(part["perplexity"][kind], 3),
            interval(
                100 * part["reward_accuracy"][kind]["mean"], [100 * x for x in part["reward_accuracy"][kind]["ci"]], 1
            ),
            f"{sum(one['seconds'] for one in part['costs'][kind]) / len(part['costs'][kind]):.0f}",
        )
        for kind, name in (("hydra", "Hydra-SFT"), ("separate", "SFT and reward model"))
    ]
    ratio, difference = part["perplexity_ratio"], part["reward_accuracy_difference"]
    columns = ("stage 1", f"perplexity {CI}", f"reward accuracy, % {CI}", "seconds")
    return (
        f"{markdown(columns, rows)}\n\nPerplexity of Hydra-SFT to that of the separate SFT model: "
        f"{with_interval(ratio, 4)}; reward accuracy in points more: "
        f"{interval(100 * difference['mean'], [100 * end for end in difference['ci']])}. "
        f"{part['num_pairs']:,} held-out pairs, seeds {', '.join(map(str, part['seeds']))}.\n\n{bars(part)}"
    )


STUDY, HYDRA_SFT = "alignment_study", "hydra_sft_study"
ALIGNMENT_TABLES: Mapping[str, tuple[str, str, Callable[[Mapping[str, Any]], str]]] = {
    "alignment-bars": (STUDY, "study", bars),
    "alignment-methods": (STUDY, "study", methods),
    "alignment-round-robin": (STUDY, "study", round_robin),
    "alignment-head-to-head": (STUDY, "study", head_to_head),
    "alignment-critic": (STUDY, "study", price_of_a_critic),
    "alignment-over-optimisation": (STUDY, "overoptimisation", over_optimisation),
    "hydra-sft": (HYDRA_SFT, "stage1", hydra_sft),
}
