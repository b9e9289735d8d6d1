"""Turns a run folder into `report.html` (one file, no network) and `report.md`."""

import base64
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_rlhf.model.roles import STAGE1_ORDER, STAGE2, passes, trunks
from hydra_rlhf.reporting import evaluation_tables, memory_plots, memory_tables, plots, tables
from hydra_rlhf.reporting.collect import read_run
from hydra_rlhf.reporting.findings import find_problems
from hydra_rlhf.reporting.histograms import score_histograms
from hydra_rlhf.reporting.inspector import inspector_data, script_json
from hydra_rlhf.reporting.markdown import render_markdown
from hydra_rlhf.reporting.preference_plots import preference_charts
from hydra_rlhf.reporting.record import RunRecord
from hydra_rlhf.runtime.files import clear_write_errors, write_file

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

SECTIONS = ("data", "evaluation", "hydra_sft", "memory", "ppo", "preference", "reward_model", "sft")
"""Sections of a recipe that warnings name settings of."""
STAGE2_FACTS = {
    "ppo": {"PPO steps": "ppo.num_steps", "Prompts per step": "ppo.rollout_batch_size"},
    "preference": {"Epochs": "preference.num_epochs", "Pairs per step": "preference.batch_size"},
}
"""What the first lines of a report say of each kind of stage 2."""
SCRIPTS = ("inspector_tokens.js", "inspector_curves.js", "inspector.js", "report.js")
"""Templates of the page's script, in the order in which they build on each other."""
STAGE_TITLES = {"sft": "SFT", "reward_model": "Reward model", "hydra_sft": "Hydra-SFT"}


def render_report(run_folder: Path) -> Path:
    """Write `report.html` and `report.md` into a run folder, finished or not; returns the path of the page.

    Raises CheckpointError where the folder is not a run folder, or cannot be written.
    """
    record = read_run(run_folder)
    contents = {"report.md": render_markdown(record), "report.html": render_html(record)}
    for name, content in contents.items():
        path = run_folder / name
        with clear_write_errors(path):
            # Lone surrogates, which JSON can hold and UTF-8 cannot, become question marks.
            write_file(path, content.encode("utf-8", errors="replace"))
    return run_folder / "report.html"


def render_html(record: RunRecord) -> str:
    """The page as one string; equal records give equal bytes."""
    environment = templates()
    # One element, so that one digest lets the page's own code run and nothing else.
    script = '"use strict";\n' + "".join(environment.get_template(name).render() + "\n" for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    inspected = inspector_data(record)
    stage1 = [
        (stage, STAGE_TITLES[stage], charts) for stage in STAGE1_ORDER if (charts := plots.stage1_charts(record, stage))
    ]
    ppo_charts, of_pairs = plots.ppo_charts(record), preference_charts(record)
    return environment.get_template("report.html.j2").render(
        record=record,
        cards=tables.cards(record),
        warnings=find_problems(record),
        facts=_facts(record),
        sharing=_sharing(record),
        roles=tables.roles_table(record),
        stages=tables.stages_table(record),
        stage1_charts=stage1,
        ppo_charts=ppo_charts,
        stage2_charts=[pair for pair in (("PPO", ppo_charts), ("Preference training", of_pairs)) if pair[1]],
        histograms=score_histograms(record),
        evaluation=[
            table
            for build in (evaluation_tables.evaluation_table, evaluation_tables.sides_table)
            if (table := build(record)) is not None
        ],
        verdicts=evaluation_tables.verdicts_table(record),
        inspected=inspected,
        has_reference=inspected is not None and any("reference" in sample for sample in inspected["samples"]),
        memory_chart=memory_plots.memory_chart(record),
        decisions=memory_tables.decisions_table(record),
        options=memory_tables.options_table(record),
        planned=memory_tables.planned_table(record),
        memory=memory_tables.memory_table(record),
        measured=memory_tables.measured_table(record),
        data=tables.data_table(record),
        environment=tables.environment_tables(record),
        script=script,
        script_digest=digest,
    )


def templates() -> "Environment":
    """The pages' templates and what they may call."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hydra_rlhf.reporting"),
        autoescape=True,  # model text may hold markup, and is shown as text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["score"] = tables.format_score
    environment.filters["script_json"] = lambda content: Markup(script_json(content))
    environment.filters["settings"] = _mark_settings
    environment.filters["count"] = tables.format_count
    return environment


def _mark_settings(text: str) -> "Markup":
    """Text as HTML, with names of settings such as ppo.kl_coef set as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(rf"\b(?:{'|'.join(SECTIONS)})\.[a-z_.]*[a-z]", r"<code>\g<0></code>", str(escape(text))))


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """(name, value) of the settings that say what a run was, for its first lines."""
    names = {
        "Model": "model.path",
        "Data": "data.train",
        **STAGE2_FACTS[STAGE2.get(record.method or "", "ppo")],
        "Seed": "seed",
    }
    found: list[tuple[str, Any]] = [("Method", record.method)]
    found += [(label, record.setting(name)) for label, name in names.items()]
    found += [("Checkpoint", record.summary.checkpoint), ("Started", record.environment.get("started"))]
    return [(label, str(value)) for label, value in found if value is not None]


def _sharing(record: RunRecord) -> str | None:
    """What the role table means for memory and time, in a sentence."""
    if not record.roles:
        return None
    num_trunks, num_passes = len(trunks(record.roles)), len(passes(record.roles))
    copies = "one copy of the base model" if num_trunks == 1 else f"{num_trunks} copies of the base model"
    return (
        f"{len(record.roles)} roles on {copies}; "
        f"{num_passes} trunk {'pass' if num_passes == 1 else 'passes'} score a batch for all of them."
    )
