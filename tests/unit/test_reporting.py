"""The report: what it reads, what it warns about, and that hostile or missing input never breaks the page."""

import json
import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hydra_rlhf.errors import CheckpointError
from hydra_rlhf.reporting.collect import read_run
from hydra_rlhf.reporting.findings import find_problems
from hydra_rlhf.reporting.memory_plots import memory_chart
from hydra_rlhf.reporting.memory_tables import decisions_table, memory_table, options_table, planned_table
from hydra_rlhf.reporting.plots import ppo_charts, thin
from hydra_rlhf.reporting.record import RunRecord, Series
from hydra_rlhf.reporting.render import render_html, render_report
from hydra_rlhf.reporting.tables import (
    cards,
    format_bytes,
    format_number,
    format_seconds,
    format_share,
    roles_table,
)

HOSTILE = (
    "</div></style></script><script>document.title='taken'</script><img src=x onerror=alert(1)> & \"quoted\" 漢字 🐙"
)

RECIPE = """\
name: demo
method: hydra-ppo
seed: 0
data:
  train: world
model:
  path: scratch:tiny
ppo:
  num_steps: 60
  rollout_batch_size: 64
  kl_coef: 0.02
"""
PARTS = ("trunks", "adapters", "heads", "gradients", "optimizer")
MEBIBYTES = {
    "ppo": (9.6, 0.0, 0.01, 4.8, 9.6),
    "lora-ppo": (9.6, 0.75, 0.01, 0.75, 1.5),
    "d-lora-ppo": (4.8, 0.75, 0.01, 0.75, 1.5),
    "j-hydra-ppo": (2.4, 0.375, 0.01, 0.375, 0.75),
    "hydra-ppo": (2.4, 0.75, 0.01, 0.75, 1.5),
}
PHASES = {
    "rollout": {"cache": 3.0, "activations": 1.0},
    "score": {"activations": 2.0},
    "update": {"gradients": 0.75, "activations": 4.0, "logits": 1.0},
}


def planned_phases(method: str) -> dict[str, dict[str, int]]:
    """Planned bytes of a method: what it holds anyway, and what each phase of stage 2 adds."""
    trunks, adapters, heads, _, optimizer = MEBIBYTES[method]
    held = {"weights": trunks, "adapters": adapters + heads, "optimizer": optimizer, "batch": 0.04}
    stage1 = {"weights": 2.4, "gradients": 2.4, "optimizer": 4.8, "activations": 3.0}
    stages = ["hydra_sft"] if "hydra" in method else ["sft", "reward_model"]
    phases = dict.fromkeys(stages, stage1) | {phase: held | more for phase, more in PHASES.items()}
    return {phase: {part: round(size * 2**20) for part, size in parts.items()} for phase, parts in phases.items()}


def decision(stage: str, sizes: list[int], chosen: int) -> dict[str, Any]:
    """What memory_plan.json says of a stage: micro-batches of these sizes were looked at, number `chosen` was taken."""
    options = [
        {
            "micro_batch_tokens": size,
            "rollout_rows": 64,
            "checkpointed_layers": 2 * (index < chosen),
            "peak": size * 2**14,
            "relative_time": 1 + 256 / size,
        }
        for index, size in enumerate(sizes)
    ]
    phases = planned_phases("hydra-ppo")
    own = {stage: phases[stage]} if stage in phases else {phase: phases[phase] for phase in PHASES}
    return {"fits": True, "budget": 2**31, "phases": own, "options": options, **options[chosen]}


def supervised_rows(noise: random.Random) -> list[dict[str, Any]]:
    """150 steps of Hydra-SFT: losses fall, accuracy rises, an evaluation every 50 steps."""
    rows: list[dict[str, Any]] = []
    for step in range(1, 151):
        left = math.exp(-step / 40)
        row = {
            "loss/sft": 1.1 + 4.4 * left + noise.gauss(0, 0.05),
            "loss/reward": 0.33 + 0.37 * left + noise.gauss(0, 0.03),
            "train/pair_accuracy": min(1.0, 0.85 - 0.33 * left + noise.gauss(0, 0.04)),
            "optim/skipped_steps": 0.0,
            "time/step_s": 0.55 + noise.random() / 20,
        }
        row["loss/total"] = row["loss/sft"] + 0.1 * row["loss/reward"]
        if step % 25 == 0:
            row |= {"eval/perplexity": 3.1 + 90 * left**2, "eval/pair_accuracy": 0.84 - 0.3 * left}
        rows.append({"stage": "hydra_sft", "step": step, **row})
    return rows


def ppo_rows(noise: random.Random) -> list[dict[str, Any]]:
    """60 steps of PPO that go well: score, gold and KL rise, everything else stays in its healthy range."""
    rows: list[dict[str, Any]] = []
    for step in range(1, 61):
        done = 1 - math.exp(-step / 22)
        row = {
            "score/mean": 2.4 * done + noise.gauss(0, 0.12),
            "kl/reference": 3.1 * done**1.5 + noise.gauss(0, 0.08),
            "ppo/entropy": 1.05 - 0.3 * done + noise.gauss(0, 0.02),
            "ppo/clip_frac": 0.04 + 0.06 * done + noise.random() / 50,
            "ppo/value_clip_frac": 0.02 + noise.random() / 50,
            "ppo/explained_variance": 0.75 - 3 * math.exp(-step / 4) + noise.gauss(0, 0.03),
            "loss/policy": -0.01 + noise.gauss(0, 0.006),
            "loss/value": 0.1 + 0.8 * math.exp(-step / 8) + noise.random() / 20,
            "response/tokens_mean": 24 + 2 * done + noise.gauss(0, 0.5),
            "response/eos_frac": min(1.0, 0.96 + 0.03 * done + noise.gauss(0, 0.005)),
            "optim/skipped_steps": 0.0,
            "time/rollout_s": 0.62 + noise.random() / 10,
            "time/score_s": 0.21 + noise.random() / 30,
            "time/update_s": 0.74 + noise.random() / 10,
            "time/step_s": 1.66,
        }
        if step % 10 == 0:
            row |= {"eval/score": 2.45 * done, "eval/gold": 0.5 + 0.3 * done, "eval/kl": 3.2 * done**1.5}
            row |= {"eval/response_tokens": 24 + 2 * done, "eval/eos_frac": 0.97}
        rows.append({"stage": "ppo", "step": step, **row})
    return rows


def sample_rows(noise: random.Random, num_samples: int) -> list[dict[str, Any]]:
    """The final comparison; sample 2 is hostile and sample 3 has responses of 10,000 characters."""
    rows = []
    for index in range(num_samples):
        gain = noise.gauss(1.6, 1.1)
        before, gold = noise.gauss(0, 1), noise.uniform(0.2, 0.7)
        rows.append(
            {
                "stage": "evaluation",
                "step": 60,
                "kind": "evaluation",
                "prompt_index": index,
                "prompt": f"Customer {index}: my parcel has not arrived. When does the shop in Graz close on Friday?",
                "response": "Thank you for asking. The shop in Graz closes at 18:00 on Friday. Have a nice day!",
                "reference_response": "the shop closes. the shop closes at I am at 18:00 ok ok",
                "score": before + gain,
                "reference_score": before,
                "kl": abs(noise.gauss(3, 1)),
                "gold": min(1.0, gold + 0.2 * gain),
                "reference_gold": gold,
            }
        )
    if num_samples > 3:
        rows[1] |= {"prompt": HOSTILE, "response": HOSTILE, "reference_response": HOSTILE}
        rows[2] |= {"response": "long " * 2000, "reference_response": "bell \x07 and null \x00"}
    return rows


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run_folder(folder: Path, *, num_samples: int = 32, few_curves: bool = False) -> Path:
    """A finished hydra-ppo run on the built-in world with realistic curves and nothing to warn about.

    `few_curves` keeps the KL only: drawing is what takes the time.
    """
    noise = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    rows = supervised_rows(noise) + ppo_rows(noise)
    if few_curves:
        rows = [{key: row[key] for key in ("stage", "step", "kl/reference") if key in row} for row in rows]
    write_lines(folder / "metrics.jsonl", rows)
    write_lines(folder / "samples.jsonl", sample_rows(noise, num_samples))
    lengths = {"p10": 14, "p50": 22, "p90": 31, "max": 44}
    split = {
        "source": "world",
        "format": "world",
        "longer_wins": 0.521,
        "prompt_tokens": lengths,
        "response_tokens": lengths,
    }
    counts = {
        "rows_read": 6000,
        "dropped": {"duplicate": 12},
        "cut": {"prompt_tokens_cut": 0, "response_tokens_cut": 3},
    }
    environment = {
        "versions": {"python": "3.11.9", "hydra-rlhf": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
        "hardware": {"cpu": "AMD EPYC 9R14", "cores": 2, "memory_bytes": 16 * 2**30, "cuda": None},
        "git": {"commit": "0f3c2d1b9e", "changed": False},
        "started": "2025-11-22T13:37:00+00:00",
    }
    roles = {
        "actor": {"trunk": "hydra", "adapter": "actor", "head": "lm", "bytes_trained": 393216},
        "critic": {"trunk": "hydra", "adapter": "critic", "head": "value", "bytes_trained": 393732},
        "reference": {"trunk": "hydra", "adapter": None, "head": "lm", "bytes_trained": 0},
        "reward": {"trunk": "hydra", "adapter": None, "head": "reward", "bytes_trained": 0},
    }
    methods = {
        name: {part: round(size * 2**20) for part, size in zip((*PARTS, "total"), (*sizes, sum(sizes)), strict=True)}
        for name, sizes in MEBIBYTES.items()
    }
    measured = {
        phase: {"rss_bytes": 2**30, "peak_rss_bytes": 2**30 + 2**24, "peak_tensor_bytes": n * 2**20}
        for phase, n in {"hydra_sft": 12, "update": 10, "evaluation": 9}.items()
    }
    decisions = {"hydra_sft": decision("hydra_sft", [4096, 2048], 1), "ppo": decision("ppo", [8192, 4096, 2048], 0)}
    summary = {
        "name": "demo",
        "method": "hydra-ppo",
        "seed": 0,
        "checkpoint": "last (step 60)",
        "num_prompts": 256,
        "gold_win_rate": 0.883,
        "gold_win_rate_ci": [0.839, 0.917],
        "score_win_rate": 0.914,
        "score_win_rate_ci": [0.874, 0.943],
        "reward_accuracy": 0.841,
        "longer_wins_accuracy": 0.521,
        "gold_accuracy": 0.862,
        "perplexity": 3.12,
        "calibration_error": 0.03,
        "kl": 2.84,
        "score_mean": 2.3,
        "reference_score_mean": 0.02,
        "gold_mean": 0.79,
        "reference_gold_mean": 0.51,
        "response_tokens_mean": 25.8,
        "reference_response_tokens_mean": 24.1,
        "eos_frac": 0.99,
        "peak_rss_bytes": 1.21 * 2**30,
        "wall_s": 214.2,
    }
    for name, value in {
        "environment.json": environment,
        "data.json": {
            "train": {**split, **counts, "rows_used": 5388},
            "test": {**split, **counts, "rows_used": 600},
            "prompts": {
                "source": "world",
                "format": "world",
                "rows_read": 5388,
                "rows_used": 5388,
                "prompt_tokens": lengths,
            },
        },
        "memory.json": {
            "dtype": "float32",
            "methods": methods,
            "roles": roles,
            "plan": {method: planned_phases(method) for method in MEBIBYTES},
            "decisions": decisions,
            "measured": measured,
        },
        "memory_plan.json": decisions,
        "summary.json": summary,
    }.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """What a browser would find in a page: tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.data = "{}"
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and data.startswith("{"):
            self.data = data
        else:
            self.text += data

    def inspected(self) -> dict[str, Any]:
        """What the inspector reads."""
        return json.loads(self.data)

    def values(self, name: str) -> list[str]:
        """Every value of an attribute, in page order."""
        return [value for _, attribute, value in self.attributes if attribute == name]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_folder(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def record(run_folder: Path) -> RunRecord:
    return read_run(run_folder)


@pytest.fixture(scope="module")
def html(record: RunRecord) -> str:
    return render_html(record)


def with_curve(record: RunRecord, metric: str, values: list[float]) -> RunRecord:
    """The record with another curve of a PPO metric at steps 10, 20, ..., and without the summary."""
    series = Series(tuple(10 * i for i in range(1, len(values) + 1)), tuple(values))
    curves = {**record.curves, "ppo": {**record.curves["ppo"], metric: series}}
    return replace(record, curves=curves, summary=type(record.summary)())


def titles(record: RunRecord) -> str:
    return " | ".join(problem.title for problem in find_problems(record))


def test_a_run_folder_is_read_whole(record: RunRecord) -> None:
    assert (record.name, record.method, record.finished, record.problems) == ("demo", "hydra-ppo", True, ())
    assert record.setting("ppo.kl_coef") == 0.02
    assert record.setting("ppo.no.such") is None
    assert record.series("ppo", "eval/gold").steps == (10, 20, 30, 40, 50, 60)  # pyright: ignore[reportOptionalMemberAccess]
    assert len(record.samples) == 32
    assert record.roles["critic"].head == "value"
    # 9.6 + 0.75 + 0.01 + 0.75 + 1.5 MiB
    assert record.methods["lora-ppo"].total == pytest.approx(12.61 * 2**20, abs=5)
    assert [split.name for split in record.splits] == ["train", "test", "prompts"]
    assert record.splits[0].dropped == {"duplicate": 12}


def test_start_and_end_are_means_of_the_outer_tenths() -> None:
    # 20 finite values, so two on each side: (0 + 1) / 2 and (18 + 19) / 2; NaN and infinities do not count.
    series = Series(tuple(range(22)), (math.nan, *(float(i) for i in range(20)), math.inf))
    assert (series.start(), series.end()) == (0.5, 18.5)
    assert Series((1,), (math.nan,)).end() is None


def test_the_cards_say_what_the_summary_says(record: RunRecord) -> None:
    shown = {card.label: f"{card.value} {card.unit} | {card.detail}".replace("\u00a0", " ") for card in cards(record)}
    assert shown["Gold win rate"] == "88.3 % | 95 %: 83.9–91.7 %; actor against reference, ties half, 256 prompts"
    assert shown["Reward accuracy"] == "84.1 % | held-out pairs; “longer wins” 52.1 %; gold itself 86.2 %"
    assert shown["KL"].startswith("2.84 nats/response")
    assert shown["Response length"].startswith("24.1 → 25.8 tokens")
    assert shown["Peak memory"].startswith("1.21 GiB")
    assert shown["Wall time"].startswith("3 min 34 s")  # 214.2 s


def test_missing_numbers_are_left_out_not_shown_as_none(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"name": "few", "kl": 1.5, "gold_win_rate": null, "score_mean": "nan"}')
    record = read_run(tmp_path)
    assert [card.label for card in cards(record)] == ["KL"]
    assert record.problems == ("summary.json: score_mean is nan; it is left out",)
    page = Page(render_html(record))
    assert "None" not in page.text
    assert page.tags.count("h2") == 1  # only "What was run": no section without content


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (2.845, "2.85"), (-0.01234, "−0.0123"), (1234.5, "1,234"), (0.00001, "1.00e-05"), (None, "–")],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert format_number(value) == text


def test_units() -> None:
    assert format_bytes(3 * 2**29) == "1.50\u00a0GiB"
    assert format_bytes(2**20) == "1.00\u00a0MiB"
    assert format_bytes(512) == "0.500\u00a0KiB"
    assert format_seconds(7260) == "2\u00a0h\u00a01\u00a0min\u00a00\u00a0s"
    assert format_seconds(2.5) == "2.50\u00a0s"
    assert format_share(0.0625) == "6.2\u00a0%"


def test_tables_show_roles_and_mark_this_run(record: RunRecord, tmp_path: Path) -> None:
    memory = memory_table(record)
    assert memory is not None
    assert [memory.rows[index][0] for index in memory.marked] == ["hydra-ppo"]
    assert memory.rows[0] == ("ppo", "9.60", "0.00", "0.01", "4.80", "9.60", "24.01")
    roles = roles_table(record)
    assert roles is not None
    assert roles.rows[1] == (
        "critic",
        "hydra",
        "critic",
        "value",
        "LoRA set “critic” and the value head (385\u00a0KiB)",
    )
    # Without memory.json the method's name is enough.
    (tmp_path / "recipe.yaml").write_text("name: full\nmethod: ppo\n")
    from_name = roles_table(read_run(tmp_path))
    assert from_name is not None
    assert from_name.rows[0] == ("actor", "actor", "none", "lm", "the whole trunk")


@pytest.mark.parametrize(
    "missing",
    [
        "recipe.yaml",
        "environment.json",
        "data.json",
        "metrics.jsonl",
        "samples.jsonl",
        "memory.json",
        "memory_plan.json",
        "summary.json",
    ],
)
def test_any_file_may_be_missing(tmp_path: Path, missing: str) -> None:
    folder = make_run_folder(tmp_path / "run", num_samples=2, few_curves=True)
    (folder / missing).unlink()
    page = render_report(folder)
    assert page == folder / "report.html"
    assert "What was run" in page.read_text("utf-8")
    assert "None" not in Page(page.read_text("utf-8")).text
    assert "None" not in (folder / "report.md").read_text("utf-8")


def test_warnings_are_on_the_page_and_say_what_to_do(tmp_path: Path) -> None:
    record = read_run(make_run_folder(tmp_path / "run", few_curves=True))
    page = Page(render_html(replace(record, summary=replace(record.summary, kl=35.0))))
    assert "KL is above 20 nats per response. The actor ends 35.0 nats" in page.text
    assert "What to do: Raise ppo.kl_coef" in page.text
    assert page.tags.count("code") == 4


def test_a_run_that_was_killed_gets_a_report(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path / "run", few_curves=True)
    for name in ("summary.json", "memory.json"):
        (folder / name).unlink()
    rollout = {"stage": "ppo", "kind": "rollout", "prompt": "p", "score": 1.0}
    write_lines(folder / "samples.jsonl", [rollout | {"step": n, "response": f"response of step {n}"} for n in (1, 2)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "ppo", "step": 61, "score/me')
    record = read_run(folder)
    assert record.problems == ()  # a cut last line is what a kill leaves
    page = Page(render_html(record))
    assert "not finished" in page.text
    kept = page.inspected()["samples"]
    assert [sample["actor"]["text"] for sample in kept] == ["response of step 1", "response of step 2"]


def test_broken_files_are_named(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path / "run", few_curves=True)
    (folder / "memory.json").write_text('{"dtype": ')
    (folder / "recipe.yaml").write_text("name: [unclosed")
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([lines[0], "oops", *lines[1:]]) + "\n")
    problems = read_run(folder).problems
    assert len(problems) == 3
    assert any("metrics.jsonl line 2 " in problem for problem in problems)
    assert "metrics.jsonl line 2 is not a JSON object" in Page(render_html(read_run(folder))).text


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a run folder.*recipe\.yaml"):
        render_report(tmp_path)
    with pytest.raises(CheckpointError, match="not a run folder"):
        render_report(tmp_path / "absent")


def test_hostile_sample_text_is_shown_as_text(html: str) -> None:
    page = Page(html)
    assert page.tags.count("script") == 2  # the data, and the code
    assert "img" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    hostile, odd = page.inspected()["samples"][1:3]
    assert [hostile["prompt"], hostile["actor"]["text"], hostile["reference"]["text"]] == [HOSTILE] * 3
    assert odd["reference"]["text"] == "bell ␇ and null ␀"


def test_hostile_text_in_every_other_file_is_shown_as_text(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path / "run", few_curves=True)
    name = "<script>bad()</script>{{ 7 * 7 }}"
    (folder / "recipe.yaml").write_text(f"name: '{name}'\nmethod: '{name}'\nmodel: {{path: '{name}'}}\n")
    split = {"source": name, "format": name, "rows_read": 3, "dropped": {name: 1}, "cut": {name: 1}}
    (folder / "data.json").write_text(json.dumps({name: split}))
    (folder / "environment.json").write_text(json.dumps({name: {name: name}, "started": name}))
    memory = {
        "dtype": name,
        "methods": {name: {"trunks": 1}},
        "roles": {name: {"trunk": name}},
        "measured": {name: {name: 1, "peak_tensor_bytes": 2}},
        "plan": {name: {name: {name: 1, "weights": 2}}},
        "decisions": {name: {"options": [{"peak": name}], "phases": name}},
    }
    (folder / "memory.json").write_text(json.dumps(memory))
    write_lines(folder / "metrics.jsonl", [{"stage": name, "step": 1, name: 1.0, "loss/total": "nan"}])
    page = Page(render_html(read_run(folder)))
    assert page.tags.count("script") == 2
    assert page.text.count("<script>bad()</script>{{ 7 * 7 }}") > 10
    markdown = (render_report(folder).parent / "report.md").read_text("utf-8")
    outside_blocks = re.sub(r"^(`{3,}).*?^\1$", "", markdown, flags=re.M | re.S)
    assert "<script" not in outside_blocks.replace("\\<script", "")


def test_only_the_page_s_own_script_may_run(html: str) -> None:
    import base64
    import hashlib

    script = html[html.index("<script>") + len("<script>") : html.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in html


def test_nothing_is_loaded_from_anywhere(html: str) -> None:
    page = Page(html)
    links = [
        value for _, name, value in page.attributes if name in {"src", "href", "xlink:href", "action", "data", "srcset"}
    ]
    assert links
    assert all(link.startswith("#") for link in links)
    assert "link" not in page.tags
    assert not re.search(r"url\((?!#)|@import|<metadata|https?:", html)


def test_ids_are_unique_and_references_lead_somewhere(html: str) -> None:
    ids = Page(html).values("id")
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)|aria-labelledby="([^"]+)"', html))
    assert {name for names in used for name in names if name} <= set(ids)


def test_long_responses_are_cut_with_a_note(html: str) -> None:
    # 10,000 characters, of which 4,000 are shown in the page.
    long = Page(html).inspected()["samples"][2]["actor"]
    assert (long["text"], long["cut"]) == ("long " * 800, 6000)


def test_without_its_script_the_page_says_where_the_samples_are(html: str) -> None:
    assert re.search(r'<div class="inspector" id="inspector"[^>]* hidden>', html)
    assert re.search(r"<noscript>.*samples\.jsonl.*</noscript>", html)


def test_text_that_utf8_cannot_hold_does_not_stop_the_report(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path / "run", num_samples=1, few_curves=True)
    row = json.loads((folder / "samples.jsonl").read_text("utf-8"))
    (folder / "samples.jsonl").write_text(json.dumps(row | {"response": "half \ud83d of a pair"}))
    assert "half ? of a pair" in render_report(folder).read_text("utf-8")


def test_equal_folders_give_equal_pages(run_folder: Path, html: str) -> None:
    assert render_html(read_run(run_folder)) == html


def test_a_healthy_run_has_no_warnings(record: RunRecord, html: str) -> None:
    assert find_problems(record) == []
    assert "No warnings" in html


@pytest.mark.parametrize(
    ("metric", "values", "title"),
    [
        ("kl/reference", [1.0, 21.0], "KL is above 20"),
        ("ppo/entropy", [1.0, 0.25], "Entropy is collapsing"),
        ("response/tokens_mean", [20.0, 31.0], "Responses became much longer"),
        ("response/tokens_mean", [20.0, 9.0], "Responses became much shorter"),
        ("response/eos_frac", [0.99, 0.7], "do not end by themselves"),
        ("ppo/explained_variance", [0.5, -0.1], "critic is no better than a constant"),
        ("ppo/clip_frac", [0.1, 0.4], "clip holds back"),
        ("optim/skipped_steps", [0.0, 2.0], "Optimizer steps were skipped"),
        ("memory/retries", [0.0, 1.0], "Memory ran out"),
        ("loss/policy", [0.1, math.nan, 0.1], "not finite"),
        ("score/mean", [0.1, math.inf], "not finite"),
    ],
)
def test_a_curve_outside_its_range_is_warned_of(
    record: RunRecord, metric: str, values: list[float], title: str
) -> None:
    found = find_problems(with_curve(record, metric, values))
    assert [title in problem.title for problem in found] == [True]


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        ("kl/reference", [1.0, 19.0]),
        ("ppo/entropy", [1.0, 0.35]),
        ("response/tokens_mean", [20.0, 29.0]),
        ("response/eos_frac", [0.99, 0.85]),
        ("ppo/explained_variance", [-9.0, 0.1]),
        ("ppo/clip_frac", [0.5, 0.2]),
    ],
)
def test_a_curve_that_ends_inside_its_range_is_not(record: RunRecord, metric: str, values: list[float]) -> None:
    assert find_problems(with_curve(record, metric, values)) == []


def test_a_critic_may_be_bad_in_its_first_steps(record: RunRecord) -> None:
    young = Series((1, 2), (-3.0, -1.0))
    curves = {"ppo": {"ppo/explained_variance": young}}
    assert find_problems(replace(record, curves=curves)) == []


def test_over_optimisation_is_seen_in_the_curves(record: RunRecord) -> None:
    # Gold peaks at 0.8 and ends at 0.6, a drop of more than a quarter of 0.8 - 0.5, while the score keeps rising.
    falling = with_curve(with_curve(record, "eval/gold", [0.5, 0.7, 0.8, 0.6]), "eval/score", [0.0, 1.0, 2.0, 3.0])
    assert "over-optimised" in titles(falling)
    assert "peaked at 0.80 in step 30 and ended at 0.60" in find_problems(falling)[0].text
    # A score that falls too is another trouble, and a dip of 0.02 is noise.
    assert "over-optimised" not in titles(with_curve(falling, "eval/score", [0.0, 1.0, 2.0, 1.0]))
    assert "over-optimised" not in titles(with_curve(falling, "eval/gold", [0.5, 0.7, 0.8, 0.78]))
    # 0.1 is little beside a rise of 2, though more than a twentieth of the peak.
    assert "over-optimised" not in titles(with_curve(falling, "eval/gold", [-1.0, 0.0, 1.0, 0.9]))


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({"gold_mean": 0.4, "gold_win_rate_ci": (0.3, 0.45)}, "over-optimised"),
        ({"kl": 35.0}, "KL is above 20"),
        ({"score_win_rate_ci": (0.47, 0.6)}, "is not shown to beat"),
        ({"longer_wins_accuracy": 0.83}, "hardly better than"),
        ({"response_tokens_mean": 50.0}, "much longer"),
        ({"eos_frac": 0.5}, "do not end by themselves"),
    ],
)
def test_a_summary_outside_its_range_is_warned_of(record: RunRecord, changes: dict[str, Any], title: str) -> None:
    found = find_problems(replace(record, summary=replace(record.summary, **changes)))
    assert [title in problem.title for problem in found] == [True]


def test_gold_that_may_have_fallen_by_chance_is_not_warned_of(record: RunRecord) -> None:
    by_chance = replace(record.summary, gold_mean=0.4, gold_win_rate_ci=(0.3, 0.55))
    assert "over-optimised" not in titles(replace(record, summary=by_chance))
    three_looks = with_curve(with_curve(record, "eval/gold", [0.5, 0.8, 0.0]), "eval/score", [0.0, 1.0, 2.0])
    assert "over-optimised" not in titles(three_looks)


def test_what_to_do_about_a_large_kl_depends_on_what_trains(record: RunRecord) -> None:
    far = replace(record, summary=replace(record.summary, kl=35.0))
    assert "ppo.kl_coef" in find_problems(far)[0].remedy
    for method in ("dpo", "simpo"):
        assert "preference.learning_rate" in find_problems(replace(far, method=method))[0].remedy


def test_many_cut_responses_are_warned_of(record: RunRecord) -> None:
    # 700 of 5388 rows are 13 %.
    cut = replace(record.splits[0], cut={"response_tokens_cut": 700})
    assert "responses in the data were cut" in titles(replace(record, splits=(cut,)))


def test_values_that_are_not_finite_are_gaps_in_the_curves(record: RunRecord) -> None:
    broken = with_curve(record, "kl/reference", [1.0, math.nan, 2.0, math.inf, 3.0])
    chart = next(chart for chart in ppo_charts(broken) if chart.key == "ppo-kl-reference")
    assert "nan" not in chart.svg.lower().replace("nats", "")
    assert "1.00 at step 10, 3.00 at step 50" in chart.svg


def test_long_series_are_drawn_as_means_of_groups() -> None:
    # 1,000 points in groups of two: (0 + 1) / 2 at step 1, (998 + 999) / 2 at step 999.
    steps, values = thin(Series(tuple(range(1000)), tuple(float(i) for i in range(1000))))
    assert (len(values), steps[0], values[0], steps[-1], values[-1]) == (500, 1, 0.5, 999, 998.5)
    assert math.isnan(thin(Series((1, 2), (math.inf, 1.0)))[1][0])


def test_charts_are_text_in_theme_colours(record: RunRecord) -> None:
    charts = ppo_charts(record)
    keys = [chart.key for chart in charts]
    assert keys[:3] == ["ppo-score-mean", "ppo-eval-gold", "ppo-kl-reference"]
    assert keys[-1] == "ppo-time"
    assert all("var(--" in chart.svg and not re.search(r"#[0-9a-f]{6}\b", chart.svg) for chart in charts)
    assert ">nats per response</text>" in next(chart.svg for chart in charts if chart.key == "ppo-kl-reference")


def test_the_memory_picture_shows_every_phase_planned_and_this_run_measured(record: RunRecord) -> None:
    chart = memory_chart(record)
    assert chart is not None
    assert not re.search(r"#[0-9a-f]{6}\b", chart.svg)
    assert chart.svg.count(" · this run</text>") == 1
    assert "hydra-ppo · this run" in chart.svg
    assert ">measured, all tensors</text>" in chart.svg
    # 2.4 + 0.76 + 0.75 + 1.5 + 0.04 + 4 + 1 = 10.45 MiB; 12.61 - 0.75 + 0.04 + 3 + 1 = 15.9 MiB for lora-ppo's rollout.
    assert ">10.4 MiB, measured 10.0</text>" in chart.svg
    assert ">15.9 MiB</text>" in chart.svg
    words = chart.svg[: chart.svg.index("viewBox")]
    assert "update: 10.4 MiB, measured 10.0" in words
    assert "score: 6.70 MiB;" in words
    # The batch's 0.04 MiB cannot be seen beside ppo's 29 MiB, and is not in the legend; everything else is.
    legend = {"weights", "adapters", "gradients", "optimizer", "batch", "cache", "activations", "logits"}
    assert {part for part in legend if f">{part}</text>" in chart.svg} == legend - {"batch"}
    on_gpu = replace(record, measured={"update": {"cuda_peak_allocated_bytes": 2**20}})
    by_cuda = memory_chart(on_gpu)
    assert by_cuda is not None
    assert ">measured by CUDA" in by_cuda.svg
    unmeasured = memory_chart(replace(record, measured={"update": {"rss_bytes": 2**20}}))
    assert unmeasured is not None
    assert ">measured" not in unmeasured.svg
    assert ", measured" not in unmeasured.svg
    assert "memory.track_tensors=true" in unmeasured.caption
    assert "track_tensors" not in chart.caption
    assert memory_chart(replace(record, plan={})) is None


def test_planned_and_measured_bytes_as_a_table(record: RunRecord) -> None:
    table = planned_table(record)
    assert table is not None
    assert table.columns[-3:] == ("Total", "Measured", "of plan")
    rows = {row[0]: row[1:] for row in table.rows}
    assert len(rows) == 3 * 5 + 2 * 4
    # 10 of 10.45 MiB are 95.7 %.
    parts = ("2.40", "0.76", "0.75", "1.50", "0.04", "0.00", "4.00", "1.00")
    assert rows["hydra-ppo: update"] == (*parts, "10.45", "10.00", "96\u00a0%")
    assert rows["hydra-ppo: score"][-2:] == ("–", "–")
    assert rows["ppo: update"][-2:] == ("–", "–")
    assert [table.rows[index][0] for index in table.marked] == [
        f"hydra-ppo: {phase}" for phase in ("hydra_sft", *PHASES)
    ]


def test_the_decisions_are_tables(record: RunRecord) -> None:
    chosen, options = decisions_table(record), options_table(record)
    assert chosen is not None
    assert options is not None
    # 2048 x 2**14 bytes are 32 MiB; stage 1 decodes nothing.
    assert chosen.rows[0] == ("hydra_sft", "2,048", "–", "0", "32.0\u00a0MiB", "2.00\u00a0GiB", "yes")
    assert chosen.rows[1][:4] == ("ppo", "8,192", "64", "0")
    assert [row[:2] for row in options.rows] == [
        ("hydra_sft", "4,096"),
        ("hydra_sft", "2,048"),
        ("ppo", "8,192"),
        ("ppo", "4,096"),
        ("ppo", "2,048"),
    ]
    assert options.marked == (1, 2)
    assert options.rows[0][3:] == ("2", "64.0\u00a0MiB", "1.06")


def test_an_unfinished_run_shows_what_it_has_planned_so_far(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path / "run", num_samples=1, few_curves=True)
    (folder / "memory.json").unlink()
    (folder / "memory_plan.json").write_text(json.dumps({"hydra_sft": decision("hydra_sft", [2048], 0)}))
    record = read_run(folder)
    assert {method: list(phases) for method, phases in record.plan.items()} == {"hydra-ppo": ["hydra_sft"]}
    assert "hydra-ppo · this run" in render_html(record)


def test_memory_that_ran_out_is_warned_of_with_the_settings_that_held(record: RunRecord) -> None:
    curves = {
        "ppo": {
            "memory/retries": Series((1, 2, 3), (0.0, 1.0, 2.0)),
            "memory/micro_batch_tokens": Series((1, 2, 3), (8192.0, 4096.0, 2048.0)),
            "memory/rollout_rows": Series((1, 2, 3), (64.0, 64.0, 64.0)),
        },
        "hydra_sft": {"memory/retries": Series((1,), (0.0,)), "memory/micro_batch_tokens": Series((1,), (512.0,))},
    }
    (found,) = find_problems(replace(record, curves=curves))
    assert "halved: 2 in ppo. " in found.text
    assert "Set ppo.micro_batch_tokens to 2048 and ppo.sampling.batch_rows to 64, where" in found.remedy
    assert "hydra_sft" not in found.text + found.remedy


@pytest.mark.parametrize("key", ["peak_tensor_bytes", "cuda_peak_allocated_bytes"])
def test_a_phase_above_its_plan_is_warned_of(record: RunRecord, key: str) -> None:
    # The update is planned with 10.45 MiB: 11.4 is 9 % above, 11.6 is 11 %.
    def with_measured(mebibytes: float) -> RunRecord:
        return replace(record, measured={"update": {key: mebibytes * 2**20, "rss_bytes": 2**40}})

    assert find_problems(with_measured(11.4)) == []
    (found,) = find_problems(with_measured(11.6))
    assert "over 10\u00a0% more memory than was planned" in found.title
    assert found.text == "update 11.6\u00a0MiB measured, 10.4\u00a0MiB planned."
    assert "memory.budget" in found.remedy


def test_the_text_report_has_the_numbers_and_samples(run_folder: Path) -> None:
    render_report(run_folder)
    text = (run_folder / "report.md").read_text("utf-8")
    assert "| Gold win rate | 88.3 % |" in text
    assert "| **hydra-ppo** | **2.40** |" in text
    assert "| **hydra-ppo: score** | **2.40** |" in text
    assert "| ppo | 8,192 | 64 | 0 |" in text
    assert "| Rows used | 5,388 | 600 | 5,388 |" in text
    assert "Actor, score" in text
    assert f"```\n{HOSTILE}\n```" in text
    assert "9,000 more characters in samples.jsonl" in text


def test_a_fence_in_a_sample_does_not_end_its_block(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path / "run", num_samples=1, few_curves=True)
    row = json.loads((folder / "samples.jsonl").read_text("utf-8"))
    (folder / "samples.jsonl").write_text(json.dumps(row | {"response": "```\n# not a heading\n````"}))
    render_report(folder)
    assert "`````\n```\n# not a heading\n````\n`````" in (folder / "report.md").read_text("utf-8")
