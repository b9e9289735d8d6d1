"""The tables of docs/results.md that come from results/speed.json and results/gpu.json."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tables_memory import MIB, markdown

GIB = 2**30
PHASES = ("generate_s", "score_s", "update_s")
NOT_RUN = {"planned": "planned only", "out-of-memory": "memory ran out"}
"""What a row that was not measured to its end says instead of a time."""


def peers(part: Mapping[str, Any]) -> str:
    """Seconds per sample of every system, and how much faster this project is than each peer."""
    systems = [
        (system, f"{seconds:.3f}", ", ".join(f"{run['s_per_sample']:.3f}" for run in part["runs"][system]))
        for system, seconds in part["s_per_sample"].items()
    ]
    faster = [
        (found["hydra"], found["peer"], f"{found['speedup']:.2f} x", f"{found['worst_speedup']:.2f} x")
        for found in part["speedups"]
    ]
    return (
        markdown(("system", "seconds per sample, median", "rounds"), systems)
        + "\n\n"
        + markdown(("this project", "peer", "faster by, medians", "our slowest, its fastest round"), faster)
    )


def ladder(part: Mapping[str, Any]) -> str:
    """The five methods: memory and seconds per sample by phase."""
    rows = [
        (
            f"`{method}`",
            f"{found['planned_bytes'] / MIB:,.0f} / {found['measured_bytes'] / MIB:,.0f} MiB",
            f"{found['time']['s_per_sample']:.3f}",
            *(f"{found['time'][phase]:.3f}" for phase in PHASES),
            f"{100 * found['bound_share']:.0f} %",
        )
        for method, found in part["methods"].items()
    ]
    table = markdown(
        ("method", "tensors, planned / measured", "seconds per sample", "generate", "score", "update", "of bound"), rows
    )
    return f"{table}\n\n`j-hydra-ppo` takes {part['joined_ratio']:.2f} x the time of `hydra-ppo`."


def scaling(part: Mapping[str, Any]) -> str:
    """Each curve as rows: time per sample by phase and memory at each of its points."""
    rows = [
        (
            name if place == 0 else "",
            str(point["value"]),
            f"{point['time']['s_per_sample']:.4f}",
            *(f"{point['time'][phase]:.4f}" for phase in PHASES),
            f"{point['planned_bytes'] / MIB:,.0f} / {point['measured_bytes'] / MIB:,.0f} MiB",
        )
        for name, points in part["curves"].items()
        for place, point in enumerate(points)
    ]
    base = ", ".join(f"{name} {value}" for name, value in part["base"].items())
    columns = ("varied", "", "seconds per sample", "generate", "score", "update", "tensors, planned / measured")
    return f"{markdown(columns, rows)}\n\nAll curves go through: {base}."


def decode_floor(part: Mapping[str, Any]) -> str:
    """Time of a decode step beside its floor."""
    rows = [
        (
            row["dtype"],
            str(row["batch"]),
            f"{1e3 * row['step_s']:.1f} ms",
            f"{1e3 * row['floor_s']:.1f} ms",
            f"{row['ratio']:.2f} x",
            " + ".join(f"{1e3 * row[f'{name}_s']:.1f}" for name in ("matrices", "cache", "logits")),
        )
        for row in part["rows"]
    ]
    columns = ("dtype", "batch", "decode step", "floor", "ratio", "floor: products + cache + logits, ms")
    return f"`{part['shape']}`\n\n{markdown(columns, rows)}"


def decode_engines(part: Mapping[str, Any]) -> str:
    """Seconds of a whole rollout with each engine, and against the project's own."""
    rows = [
        (
            row["responses"],
            f"{row['mean_length']:.0f}",
            f"`{engine}`",
            f"{taken['median_s']:.2f}",
            ", ".join(f"{seconds:.2f}" for seconds in taken["rounds_s"]),
            f"{taken['median_s'] / row['engines']['slots']['median_s']:.2f} x",
        )
        for row in part["rows"]
        for engine, taken in row["engines"].items()
    ]
    columns = ("responses", "mean tokens", "engine", "seconds per rollout, median", "rounds", "of `slots`")
    settings = part["settings"]
    return (
        f"`{part['shape']}`, {settings['prompts']} prompts of {settings['shortest']} to {settings['longest']} tokens, "
        f"{settings['rows']} rows at a time.\n\n{markdown(columns, rows)}"
    )


def unequal_lengths(part: Mapping[str, Any]) -> str:
    """Time of scoring and updating per token, as padding grows."""
    rows = [
        (
            f"{row['mean_length']:.0f}",
            f"{100 * row['padding_share']:.0f} %",
            f"{row['score_s_per_sample']:.4f}",
            f"{row['update_s_per_sample']:.4f}",
            f"{row['per_token_ratio']:.2f} x",
        )
        for row in part["rows"]
    ]
    columns = ("mean response", "padding", "score, s/sample", "update, s/sample", "both per token, of full responses")
    return markdown(columns, rows)


def gpu_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `hydra-rlhf bench` on a GPU; bounds are beside the times, planned rows have none."""
    lines = []
    for row in rows:
        memory = f"{row['planned_bytes'] / GIB:.1f}"
        first = (f"`{row['method']}`", row.get("budget", ""), str(row["batch"]))
        if row["status"] != "measured":
            lines.append((*first, memory, "–", NOT_RUN[row["status"]], "", "", "", ""))
            continue
        lines.append(
            (
                *first,
                memory,
                "–" if row["measured_bytes"] is None else f"{row['measured_bytes'] / GIB:.1f}",
                f"{row['time']['s_per_sample']:.3f}",
                *(f"{row['time'][phase]:.3f} ({row['bound'][phase]:.3f})" for phase in PHASES),
                f"{100 * row['shares']['bound']:.0f} %",
            )
        )
    columns = ("method", "budget", "batch", "planned GiB", "measured GiB", "s/sample", "generate", "score", "update")
    return markdown((*columns, "of bound"), lines)


def gpu(part: Mapping[str, Any]) -> str:
    """A part of gpu.json; bounds in brackets are by the device's two measured rates."""
    bench = part["bench"]
    work, machine, lora = bench["workload"], bench["machine"], bench["lora"]
    return (
        f"`{bench['model']}`, {bench['dtype']}, prompts of {work['prompt_tokens']} and responses of "
        f"{work['response_tokens']} tokens, LoRA rank {lora['rank']} on {', '.join(lora['targets'])}. "
        f"In brackets: the least time by the measured {machine['bandwidth'] / 1e9:,.0f} GB/s and "
        f"{machine['matrix_rate'] / 1e12:,.0f} TFLOP/s.\n\n{gpu_rows(part['rows'])}"
    )


SPEED_TABLES: Mapping[str, tuple[str, str, Callable[[Mapping[str, Any]], str]]] = {
    "speed-peers": ("speed", "peers", peers),
    "ladder-time": ("speed", "ladder", ladder),
    "scaling": ("speed", "scaling", scaling),
    "decode-floor": ("speed", "decode_floor", decode_floor),
    "decode-engines": ("speed", "decode_engines", decode_engines),
    "unequal-lengths": ("speed", "unequal_lengths", unequal_lengths),
    "gpu-methods": ("gpu", "methods", gpu),
    "gpu-nf4": ("gpu", "nf4", gpu),
    "gpu-curve": ("gpu", "curve", gpu),
}
