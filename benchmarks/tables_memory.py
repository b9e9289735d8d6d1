"""The tables of docs/results.md that come from results/memory.json."""

from collections.abc import Callable, Mapping
from typing import Any

MIB = 2**20


def markdown(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def peers(part: Mapping[str, Any]) -> str:
    """Peak resident memory of every system, and what this project needs of each peer's."""
    medians = markdown(
        ("system", "peak resident memory", "seconds per sample"),
        [
            (system, f"{found['peak_rss_mib']:,.0f} MiB", f"{found['s_per_sample']:.2f}")
            for system, found in part["medians"].items()
        ],
    )
    ratios = markdown(
        ("this project", "peer", "bar", "peak, medians", "peak, worst pair", "time, medians"),
        [
            (
                f"`memory.checkpointing={ratio['hydra'].removeprefix('hydra-')}`",
                ratio["peer"],
                f"<= {ratio['bar']:.2f} x",
                f"{ratio['peak_ratio']:.2f} x",
                f"{ratio['worst_peak_ratio']:.2f} x",
                f"{ratio['time_ratio']:.2f} x",
            )
            for ratio in part["ratios"]
        ],
    )
    return f"{medians}\n\n{ratios}"


def compared(label: str, comparison: Mapping[str, Any]) -> tuple[str, ...]:
    """One row of a comparison of two runs' peaks."""
    ours, other = (run["peak_tensor_bytes"] / MIB for run in comparison["runs"])
    bar, ratio = comparison["bar"], comparison["ratio"]
    return label, f"<= {bar:.2f} x", f"{ours:,.0f} MiB", f"{other:,.0f} MiB", f"{ratio:.2f} x"


COMPARED_COLUMNS = ("comparison", "bar", "hydra-ppo", "the other", "ratio")


def grpo_price(part: Mapping[str, Any]) -> str:
    """Peak tensor bytes with and without the critic."""
    rows = [compared(f"without its critic, checkpointing {policy}", part[policy]) for policy in ("none", "layers")]
    return markdown(COMPARED_COLUMNS, rows)


def full_sft(part: Mapping[str, Any]) -> str:
    """Peak tensor bytes against full fine-tuning."""
    return markdown(COMPARED_COLUMNS, [compared("full SFT, checkpointing layers", part)])


def kept(part: Mapping[str, Any]) -> str:
    """What a layer keeps for backward, against the ideal."""
    worst = f"{part['worst_ratio']:.3f} x"
    return markdown(
        ("activations kept by a layer", "bar", "worst"), [("of the ideal", f"<= {part['bar']:.2f} x", worst)]
    )


MEMORY_TABLES: Mapping[str, tuple[str, str, Callable[[Mapping[str, Any]], str]]] = {
    "memory-peers": ("memory", "peers", peers),
    "memory-grpo": ("memory", "grpo_price", grpo_price),
    "memory-sft": ("memory", "full_sft", full_sft),
    "memory-kept": ("memory", "kept", kept),
}
