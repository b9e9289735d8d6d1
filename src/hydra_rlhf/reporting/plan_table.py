"""The memory plan on the terminal: a verdict, what each phase of each method holds, and what it was decided from."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hydra_rlhf.memory.count import PARTS
from hydra_rlhf.reporting.tables import byte_unit

WIDE = 96
"""Columns from which tables are set with more space."""
SHORT = {"adapters": "adapt.", "gradients": "grad.", "optimizer": "optim.", "activations": "activ."}
"""Headings of parts where their names are too long for a terminal of 80 columns."""
LEGEND = (
    "micro-batch: padded tokens per forward of stage 2 · rows: responses decoded together · recomputed: layers run "
    "again in backward (activation checkpointing)"
)


FITS_WITH = "fits with "
"""How a remedy begins that helps."""


def print_plan(plan: Mapping[str, Any], detailed: Collection[str]) -> None:
    """A verdict, one row per method, the phases of each, and for the methods `detailed` how settings were found."""
    console = Console(highlight=False)
    console.print(Text(verdict(plan), style="bold"))
    console.print(Text(what_is_planned(plan), style="dim"))
    console.print()
    console.print(methods_table(plan, console.width))
    console.print(Text(LEGEND, style="dim"))
    for sentence in remarks(plan):
        console.print(Text(sentence))
    for name, row in plan["methods"].items():
        console.print()
        console.print(
            Text.assemble((name, "bold"), f", {unit_of(plan)[0]} of tensors in each phase when it holds most")
        )
        console.print(phases_table(plan, row, console.width))
    for name in detailed:
        console.print()
        console.print(Text.assemble((name, "bold"), ", what was looked at and chosen"))
        console.print(options_table(plan, plan["methods"][name], console.width))


def verdict(plan: Mapping[str, Any]) -> str:
    """Whether it fits, in one sentence: with what settings for one method, else which methods do."""
    budget = budget_text(plan)
    if len(plan["methods"]) == 1:
        ((name, row),) = plan["methods"].items()
        cuts = row["stages"][row["stage2"]]
        need = f"{in_unit(plan, row['peak'])} {unit_of(plan)[0]} at its largest phase ({row['peak_phase']})"
        settings = f"micro-batches of {cuts['micro_batch_tokens']:,} tokens, {rows_text(cuts['rollout_rows'])}"
        if not row["fits"]:
            return f"As it is set {name} does not fit {budget}: {need} at the least; {row['remedy']}."
        graphs = f", {cuts['kept_graphs']} graphs kept until all values are known" if cuts["kept_graphs"] > 1 else ""
        layers = layers_text(cuts["checkpointed_layers"], plan)
        return f"{name} fits {budget}: {need}; stage 2 in {settings}, {layers}{graphs}."
    fitting = [name for name, row in plan["methods"].items() if row["fits"]]
    if not fitting:
        return f"As it is set none of {len(plan['methods'])} methods fits {budget}. {best_remedy(plan)}".strip()
    return f"Of {len(plan['methods'])} methods {len(fitting)} fit {budget}: {', '.join(fitting)}."


def best_remedy(plan: Mapping[str, Any]) -> str:
    """What has to be changed for the methods that need the fewest changes to fit; empty where no change helps."""
    remedies = {name: row["remedy"] for name, row in plan["methods"].items() if row["remedy"].startswith(FITS_WITH)}
    if not remedies:
        return ""
    fewest = min(text.count("=") for text in remedies.values())
    parts: list[str] = []
    for remedy in dict.fromkeys(text for text in remedies.values() if text.count("=") == fewest):
        names = [name for name, text in remedies.items() if text == remedy]
        parts.append(
            f"with {remedy.removeprefix(FITS_WITH)} {' and '.join(names)} {'fits' if len(names) == 1 else 'fit'}"
        )
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def budget_text(plan: Mapping[str, Any]) -> str:
    """The budget in words."""
    if plan["budget"] == "auto":
        return f"what is free here, {in_unit(plan, plan['tensor_budget'])} {unit_of(plan)[0]}"
    return " ".join(re.split(r"(?<=\d) *(?=[A-Za-z])", plan["budget"]))


def rows_text(rows: int) -> str:
    """How responses are decoded, in words."""
    return "1 row decoded at a time" if rows == 1 else f"{rows} rows decoded together"


def layers_text(layers: int, plan: Mapping[str, Any]) -> str:
    """How much is recomputed, in words."""
    if layers in (0, plan["num_layers"]):
        return "no layer recomputed" if layers == 0 else "all layers recomputed"
    return f"{layers} of {plan['num_layers']} layers recomputed"


def what_is_planned(plan: Mapping[str, Any]) -> str:
    """Model, adapters, batch and budget, on one or two lines."""
    work = plan["workload"]
    dtype = plan["dtype"] if plan["dtype_why"] == "as set" else f"{plan['dtype']}, {plan['dtype_why']}"
    packed = "" if plan["quantization"] == "none" else f", {plan['quantization']} base"
    factors = ", ".join(f"{phase} x {by:.2f}" for phase, by in plan["corrections"].items())
    probed = f"; corrected by a probe: {factors}" if factors else ""
    left = plan["process_bytes"] / 2**30
    process = f", {left:.2f} GiB less for the process itself" if left else ""
    prompt = work["prompt_tokens"]
    texts = {
        "ppo": f"rollouts of {work['num_sequences']} x ({prompt} + {work['response_tokens']}) tokens, minibatches of "
        f"{work['minibatch_size']}; ",
        "preference": f"pairs of 2 x ({prompt} + {work['data_response_tokens']}) tokens; ",
    }
    kinds = [row["stage2"] for row in plan["methods"].values()]
    return (
        f"{plan['model']} ({plan['num_layers']} layers, {dtype}{packed}), LoRA rank {plan['lora']['rank']} on "
        f"{' '.join(plan['lora']['targets'])}; {''.join(text for kind, text in texts.items() if kind in kinds)}"
        f"{in_unit(plan, plan['tensor_budget'])} {unit_of(plan)[0]} for tensors{process}{probed}"
    )


def methods_table(plan: Mapping[str, Any], width: int) -> Table:
    """One row per method: does it fit, its largest phase, and the settings of stage 2; full SFT for comparison."""
    table = plain_table(width)
    numbers = (f"peak {unit_of(plan)[0]}", "micro-batch", "rows", "recomputed")
    for heading in ("method", "fits", "peak phase", *numbers):
        table.add_column(heading, justify="right" if heading in numbers else "left", no_wrap=True)
    for name, row in plan["methods"].items():
        settings = settings_cells(plan, row["stages"][row["stage2"]])
        table.add_row(name, yes_or_no(row["fits"]), row["peak_phase"], in_unit(plan, row["peak"]), *settings)
    sft = plan["full_sft"]
    tokens, _, layers = settings_cells(plan, sft)
    cells = ("full SFT", yes_or_no(sft["fits"]), "sft", in_unit(plan, sft["peak"]), tokens, "", layers)
    table.add_row(*cells, style="dim")
    return table


def settings_cells(plan: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[str, str, str]:
    """Micro-batch, rows and recomputed layers of a decision or an option."""
    return (
        f"{settings['micro_batch_tokens']:,}",
        str(settings["rollout_rows"]),
        f"{settings['checkpointed_layers']}/{plan['num_layers']}",
    )


def remarks(plan: Mapping[str, Any]) -> list[str]:
    """What each method could take at most, or what would make it fit."""
    found = [
        f"{name}: {largest_text(row['largest'])}." if row["fits"] else f"{name}: {row['remedy']}."
        for name, row in plan["methods"].items()
        if row["fits"] or len(plan["methods"]) > 1  # of a single method the verdict says it
    ]
    if any("=" in row.get("remedy", "") for row in plan["methods"].values()):
        found.append("NAME=VALUE is given as --NAME VALUE, or in the recipe.")
    return found


def largest_text(largest: Mapping[str, int]) -> str:
    """The most that would fit, in words."""
    plain, recomputed = largest["micro_batch_tokens"], largest["micro_batch_tokens_checkpointed"]
    text = f"at most {rows_text(largest['rollout_rows'])}, and micro-batches of "
    if plain == recomputed:
        return text + f"{plain:,} tokens"
    if plain == 0:
        return text + f"{recomputed:,} tokens with all layers recomputed (none without)"
    return text + f"{plain:,} tokens with no layer recomputed ({recomputed:,} with all)"


def phases_table(plan: Mapping[str, Any], row: Mapping[str, Any], width: int) -> Table:
    """Every part of every phase that holds anything; the largest phase, which is the method's peak, is bold."""
    least = 0.005 * unit_of(plan)[1]  # what is less is shown as zero
    shown = [part for part in PARTS if any(parts[part] >= least for parts in row["phases"].values())]
    table = plain_table(width)
    table.add_column("phase", no_wrap=True)
    for heading in (*(SHORT.get(part, part) for part in shown), "total"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, parts in row["phases"].items():
        numbers = [*(parts[part] for part in shown), sum(parts.values())]
        style = "bold" if name == row["peak_phase"] else ""
        table.add_row(name, *(in_unit(plan, number) for number in numbers), style=style)
    return table


def options_table(plan: Mapping[str, Any], row: Mapping[str, Any], width: int) -> Table:
    """The options that each stage's settings were chosen from."""
    table = plain_table(width)
    numbers = ("micro-batch", "rows", "recomputed", f"peak {unit_of(plan)[0]}", "relative time")
    for heading in ("stage", *numbers, ""):
        table.add_column(heading, justify="right" if heading in numbers else "left", no_wrap=True)
    for stage, decision in row["stages"].items():
        for option in decision["options"]:
            chosen = settings_cells(plan, option) == settings_cells(plan, decision)
            tokens, rows, layers = settings_cells(plan, option)
            cells = (tokens, rows if stage == row["stage2"] else "", layers, in_unit(plan, option["peak"]))
            mark = ("<- chosen" if decision["fits"] else "<- needs least") if chosen else ""
            time = f"{option['relative_time']:.2f}"
            table.add_row(stage, *cells, time, mark, style="bold" if chosen else "")
    return table


def plain_table(width: int) -> Table:
    """A table without lines, narrow on narrow terminals."""
    return Table(box=None, padding=(0, 2 if width >= WIDE else 1, 0, 0), header_style="dim")


def yes_or_no(fits: bool) -> Text:
    """A verdict in a cell."""
    return Text("yes", style="green") if fits else Text("no", style="red")


def unit_of(plan: Mapping[str, Any]) -> tuple[str, float]:
    """(unit, bytes per unit) of the whole plan: by the largest phase of any method."""
    return byte_unit(max(row["peak"] for row in (*plan["methods"].values(), plan["full_sft"])))


def in_unit(plan: Mapping[str, Any], num_bytes: float) -> str:
    """Bytes in the plan's unit."""
    unit, size = unit_of(plan)
    return f"{num_bytes / size:,.{2 if unit == 'GiB' else 1}f}"
