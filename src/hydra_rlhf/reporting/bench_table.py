"""What `hydra-rlhf bench` found, on the terminal: a row per method, measured ones and planned ones apart."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hydra_rlhf.reporting.plan_table import plain_table
from hydra_rlhf.reporting.tables import byte_unit, format_bytes, format_number

MEASURED = "measured"
NOTES = {
    "planned": "planned",
    "out-of-memory": "no memory",
}
"""What stands in place of the times of a row that was not measured to its end."""
LEGEND = (
    "s/sample: a PPO step by its sequences, medians without the first of several steps, split into generating, "
    "scoring, updating · tok/s: prompt and response tokens through whole steps · bound: the least time by the device's "
    "two rates, of the time it took · bandw., matrix: bytes and operations that are needed, of those that the device "
    "could do meanwhile; learning is scoring and updating · +: no larger batch was tried · planned: not run, since by "
    "the plan it does not fit · no memory: begun, and memory ran out"
)


def print_bench(found: Mapping[str, Any]) -> None:
    """The comparisons, each as a table, and what they were measured on."""
    console = Console(highlight=False)
    console.print(Text(what_was_run(found), style="dim"))
    for title, rows in titled_rows(found):
        console.print()
        console.print(Text(title, style="bold"))
        console.print(rows_table(rows, console.width))
        if any(row["status"] == MEASURED for row in rows):
            console.print(shares_table(rows, console.width))
    console.print()
    console.print(Text(LEGEND, style="dim"))


def titled_rows(found: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Each comparison that was made, with its heading."""
    work = found["workload"]
    made = []
    if found["equal_batch"]:
        made.append((f"Equal batch: {work['num_sequences']} sequences per PPO step", found["equal_batch"]))
    if found["equal_budget"]:
        budget = format_bytes(found["shared_budget_bytes"])
        made.append((f"Equal memory: the largest batch that fits {budget} of tensors", found["equal_budget"]))
    return made


def what_was_run(found: Mapping[str, Any]) -> str:
    """Model, lengths, device and the device's two rates."""
    work, machine, lora = found["workload"], found["machine"], found["lora"]
    dtype = found["dtype"] if found["dtype_why"] == "as set" else f"{found['dtype']}, {found['dtype_why']}"
    packed = "" if found["quantization"] == "none" else f", {found['quantization']} base"
    prompts = f"prompts of {work['prompts']} of at most" if work["prompts"] else "prompts of"
    return (
        f"{found['model']} ({dtype}{packed}) on {found['device']}, LoRA rank {lora['rank']} on "
        f"{' '.join(lora['targets'])}; {prompts} {work['prompt_tokens']} tokens, responses of "
        f"{work['response_tokens']}; {found['iterations']} PPO steps. Measured here: "
        f"{format_number(machine['bandwidth'] / 1e9)} GB/s, {format_number(machine['matrix_rate'] / 1e12)} TFLOP/s."
    )


def rows_table(rows: Sequence[Mapping[str, Any]], width: int) -> Table:
    """One row per method: memory, and seconds per sample by phase. A row that was not measured has a note instead."""
    unit, size = byte_unit(max(max(row["planned_bytes"], row["measured_bytes"] or 0) for row in rows))
    table = plain_table(width)
    table.add_column("method", no_wrap=True)
    for heading in ("batch", f"plan {unit}", "meas.", "s/sample", "gen.", "score", "upd.", "tok/s", "bound"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        batch = f"{row['batch']}{'+' if row.get('batch_is_capped') else ''}"
        measured = "–" if row["measured_bytes"] is None else f"{row['measured_bytes'] / size:,.2f}"
        cells = (batch, f"{row['planned_bytes'] / size:,.2f}", measured)
        if row["status"] == MEASURED:
            table.add_row(row["method"], *cells, *time_cells(row))
        else:
            table.add_row(row["method"], *cells, Text(NOTES[row["status"]], style="italic"), style="dim")
    return table


def time_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Seconds per sample by phase, tokens per second, and the bound's share of the time."""
    time = row["time"]
    seconds = [format_number(time[name]) for name in ("s_per_sample", "generate_s", "score_s", "update_s")]
    return (*seconds, f"{row['tokens_per_s']:,.0f}", percent(row["shares"]["bound"]))


def shares_table(rows: Sequence[Mapping[str, Any]], width: int) -> Table:
    """How the work was cut, and how much of the device's two rates each measured row put to use."""
    table = plain_table(width)
    table.add_column("method", no_wrap=True)
    for heading in ("batch", "per forward", "decoded", "recomputed", "gen. bandw.", "gen. matrix", "learn matrix"):
        table.add_column(heading, justify="right")
    for row in rows:
        if row["status"] != MEASURED:
            continue
        cut = (f"{row['micro_batch_tokens']:,} tok.", f"{row['rollout_rows']} rows", f"{row['checkpointed_layers']}")
        used = [percent(row["shares"][name]) for name in ("generate_bandwidth", "generate_matrix", "learn_matrix")]
        table.add_row(row["method"], str(row["batch"]), *cut, *used)
    return table


def percent(share: float) -> str:
    """A share of one, in whole percent."""
    return f"{100 * share:.0f} %"
