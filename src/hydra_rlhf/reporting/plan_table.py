"""The memory plan on the terminal: what each phase of each method holds, and the options it was decided from."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

PARTS = ("weights", "adapters", "gradients", "optimizer", "batch", "cache", "activations", "logits")
GIB = 2**30


def print_plan(plan: Mapping[str, Any]) -> None:
    """Methods with their largest phase, the phases of each, and how the chosen settings were found."""
    console = Console(highlight=False)
    work = plan["workload"]
    quantized = "" if plan["quantization"] == "none" else f", {plan['quantization']} base"
    console.print(
        f"{plan['model']} ({plan['num_layers']} layers, {plan['dtype']}{quantized}), LoRA rank {plan['lora']['rank']} "
        f"on {' '.join(plan['lora']['targets'])}; rollout {work['num_sequences']} x ({work['prompt_tokens']} + "
        f"{work['response_tokens']}) tokens, minibatch {work['minibatch_size']}"
    )
    console.print(f"budget {plan['budget']}: {gib(plan['tensor_budget'])} GiB for tensors")
    console.print(methods_table(plan))
    for name, row in plan["methods"].items():
        console.print()
        console.print(phases_table(name, row))
    fitting = [name for name, row in plan["methods"].items() if row["fits"]]
    if fitting:
        console.print()
        console.print(options_table(fitting[-1], plan["methods"][fitting[-1]]["stages"]["ppo"]))


def methods_table(plan: Mapping[str, Any]) -> Table:
    """One row per method: does it fit, with what, and what is the most it could take; full SFT for comparison."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("method", "largest phase", "GiB", "fits", "micro-batch", "rows decoded", "checkpointed", "at most"):
        table.add_column(heading, justify="left" if heading in ("method", "largest phase", "at most") else "right")
    for name, row in plan["methods"].items():
        ppo = row["stages"]["ppo"]
        table.add_row(
            name,
            row["peak_phase"],
            gib(row["peak"]),
            Text("yes", style="green") if row["fits"] else Text("no", style="red"),
            f"{ppo['micro_batch_tokens']} tokens",
            str(ppo["rollout_rows"]),
            f"{ppo['checkpointed_layers']} of {plan['num_layers']}",
            largest_text(row["largest"]) if row["fits"] else row["remedy"],
        )
    sft = plan["full_sft"]
    fits = Text("yes", style="green") if sft["fits"] else Text("no", style="red")
    tokens, layers = f"{sft['micro_batch_tokens']} tokens", f"{sft['checkpointed_layers']} of {plan['num_layers']}"
    table.add_row("full SFT", "sft", gib(sft["peak"]), fits, tokens, "", layers, "")
    return table


def largest_text(largest: Mapping[str, int]) -> str:
    """The most that would fit, in words."""
    return (
        f"{largest['rollout_rows']} rows decoded together; micro-batches of {largest['micro_batch_tokens']} tokens, or "
        f"{largest['micro_batch_tokens_checkpointed']} with all layers checkpointed"
    )


def phases_table(name: str, row: Mapping[str, Any]) -> Table:
    """MiB of every part of every phase; the largest phase is the method's peak."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(f"{name} (MiB)")
    for part in (*PARTS, "total"):
        table.add_column(part, justify="right")
    for phase, parts in row["phases"].items():
        style = "bold" if phase == row["peak_phase"] else ""
        numbers = [parts[part] for part in PARTS]
        table.add_row(phase, *(f"{number / 2**20:,.0f}" for number in (*numbers, sum(numbers))), style=style)
    return table


def options_table(name: str, decision: Mapping[str, Any]) -> Table:
    """The options the settings of stage 2 were chosen from, the chosen one marked."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(f"{name}: options looked at")
    for heading in ("rows decoded", "checkpointed", "GiB", "relative time"):
        table.add_column(heading, justify="right")
    keys = ("micro_batch_tokens", "rollout_rows", "checkpointed_layers")
    for option in decision["options"]:
        chosen = all(option[key] == decision[key] for key in keys)
        table.add_row(
            f"micro-batches of {option['micro_batch_tokens']} tokens",
            str(option["rollout_rows"]),
            str(option["checkpointed_layers"]),
            gib(option["peak"]),
            f"{option['relative_time']:.2f}" + (" <- chosen" if chosen else ""),
        )
    return table


def gib(num_bytes: float) -> str:
    """Bytes in GiB, with two digits behind the point."""
    return f"{num_bytes / GIB:.2f}"
