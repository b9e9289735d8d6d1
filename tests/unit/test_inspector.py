"""What the page's inspector is given: every kept sample that the page has room for, as data that nothing escapes."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import token_samples

from hydra_rlhf.reporting import inspector
from hydra_rlhf.reporting.collect import read_run
from hydra_rlhf.reporting.inspector import inspector_data, sample_entry, scale_of, script_json
from hydra_rlhf.reporting.reading import tokens, verdicts
from hydra_rlhf.reporting.record import RunRecord
from hydra_rlhf.reporting.render import render_html

ATTACKS = (
    "</script><script>alert(1)</script>",
    "<!-- <script>",
    "]]> & &lt; \u2028 \u2029 \\u003c",
    "</SCRIPT \n>",
)


def run_of(folder: Path, rows: list[dict[str, Any]], *, with_curves: bool = False) -> RunRecord:
    """A run of which only samples (and a KL curve) are there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if with_curves:
        lines = [{"stage": "ppo", "step": step, "kl/reference": step / 10} for step in range(1, 61)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return read_run(folder)


def entries(record: RunRecord) -> list[dict[str, Any]]:
    """The samples that the page has."""
    data = inspector_data(record)
    assert data is not None
    return data["samples"]


class Scripts(HTMLParser):
    """The content of each script element, as a browser would find it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "script":
            self.found.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script":
            self.found[-1] += data


def test_every_kept_sample_is_there_with_its_tokens(tmp_path: Path) -> None:
    rows = token_samples.sample_rows(num_pairs=3, steps=range(1, 5))
    found = entries(run_of(tmp_path, rows))
    assert [(entry["kind"], entry["step"]) for entry in found] == [(row["kind"], row["step"]) for row in rows]
    for entry, row in zip(found, rows, strict=True):
        assert "".join(entry["actor"]["pieces"]) == row["response"]
        assert entry["actor"]["numTokens"] == len(row["tokens"]["pieces"])
        assert entry["actor"]["numbers"]["kl"] == pytest.approx(row["tokens"]["kl"], rel=6e-3)
        assert entry["actor"]["ended"] == row["ended"]
    assert {"advantage", "reward", "change"} <= set(found[0]["actor"]["numbers"])
    assert set(found[-1]["reference"]["numbers"]) == {"kl", "value", "logprob"}
    assert "reference" not in found[0]


def test_the_switch_offers_only_what_was_kept(tmp_path: Path) -> None:
    rows = token_samples.sample_rows(num_pairs=0, steps=range(1, 3))
    data = inspector_data(run_of(tmp_path / "all", rows))
    assert data is not None
    assert [q["key"] for q in data["quantities"]] == ["kl", "advantage", "value", "reward", "change"]
    for row in rows:
        del row["tokens"]["value"]
    without = inspector_data(run_of(tmp_path / "critic-free", rows))
    assert without is not None
    assert [q["key"] for q in without["quantities"]] == ["kl", "advantage", "reward", "change"]
    for row in rows:
        del row["tokens"]
    old = inspector_data(run_of(tmp_path / "old", rows))
    assert old is not None
    assert old["quantities"] == []
    assert old["samples"][0]["actor"]["text"] == rows[0]["response"]
    assert inspector_data(run_of(tmp_path / "none", [])) is None


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_sample_can_end_the_script_that_holds_it(tmp_path: Path, attack: str) -> None:
    (row,) = token_samples.sample_rows(num_pairs=1, steps=range(0))
    row |= {"prompt": attack, "response": attack, "reference_response": attack, "sources": {attack: 1.0}}
    row["tokens"] = {"ids": [1, 2], "pieces": [attack[:3], attack[3:]], "names": {"0": attack}, "kl": [0.1, 0.2]}
    html = render_html(run_of(tmp_path, [row]))
    page = Scripts(html)
    assert len(page.found) == 2
    (entry,) = json.loads(page.found[0])["samples"]
    assert (entry["prompt"], "".join(entry["actor"]["pieces"]), entry["reference"]["text"]) == (attack,) * 3
    assert entry["actor"]["names"] == {"0": attack}
    data = html[html.index('id="inspector-data">') :]
    data = data[: data.index("</script>")]
    assert not set("<&\u2028\u2029") & set(data.removeprefix('id="inspector-data">'))


def test_json_of_a_script_is_json() -> None:
    content = {"a": [*ATTACKS, "漢字 🐙 \x00"], "b": [1.5, None, True]}
    assert json.loads(script_json(content)) == content
    with pytest.raises(ValueError, match="Out of range"):
        script_json([math.nan])


def test_pieces_that_are_not_the_response_s_are_not_shown(tmp_path: Path) -> None:
    (row,) = token_samples.sample_rows(num_pairs=0, steps=range(1, 2), per_step=1)
    other = run_of(tmp_path / "a", [row | {"response": "another text"}])
    assert entries(other)[0]["actor"]["text"] == "another text"
    assert "pieces" not in entries(other)[0]["actor"]
    uneven = row | {"tokens": row["tokens"] | {"kl": [1.0]}}
    assert entries(run_of(tmp_path / "b", [uneven]))[0]["actor"]["text"] == row["response"]


@pytest.mark.parametrize(
    "value", [None, 3, [], {"pieces": "ab"}, {"pieces": [1]}, {"pieces": ["a"], "ids": [1, 2]}, {"ids": [1]}]
)
def test_what_is_no_token_record_is_none(value: object) -> None:
    assert tokens(value) is None


def test_numbers_that_are_not_finite_are_holes(tmp_path: Path) -> None:
    read = tokens({"pieces": ["a", "b"], "kl": ["nan", 0.5], "ids": ["inf", 7], "names": {"0": None}})
    assert read is not None
    assert math.isnan(read.numbers["kl"][0])
    assert (read.numbers["kl"][1], read.ids, read.names) == (0.5, (0, 7), {"0": "None"})
    (row,) = token_samples.sample_rows(num_pairs=0, steps=range(1, 2), per_step=1)
    row["tokens"]["kl"][0], row["score"] = "inf", "nan"
    (entry,) = entries(run_of(tmp_path, [row]))
    assert entry["actor"]["numbers"]["kl"][0] is None
    assert "score" not in entry["actor"]


def test_long_responses_are_cut_at_a_token(tmp_path: Path) -> None:
    (row,) = token_samples.sample_rows(num_pairs=0, steps=range(1, 2), per_step=1)
    row["response"] = "12345678 " * 1000
    row["tokens"] = {"pieces": ["12345678 "] * 1000, "ids": [5] * 1000, "kl": [0.5] * 1000, "names": {"999": "x"}}
    side = entries(run_of(tmp_path, [row]))[0]["actor"]
    # 444 pieces of 9 characters are 3,996; the 445th would pass 4,000.
    assert (len(side["pieces"]), len(side["numbers"]["kl"]), len(side["ids"])) == (444, 444, 444)
    assert (side["cut"], side["numTokens"], side["names"]) == (9000 - 3996, 1000, {})


def test_colours_are_strongest_at_the_largest_two_in_a_hundred() -> None:
    # Of 1 to 100, 98 are at most 98; the 99th is where the colour is at its strongest.
    values = [float(value) for value in range(1, 101)]
    assert scale_of(values, around_median=False) == {"centre": 0.0, "limit": 99.0}
    # Around the median of 1, 2, 10 the largest distance is 8.
    assert scale_of([1.0, 2.0, 10.0], around_median=True) == {"centre": 2.0, "limit": 8.0}
    assert scale_of([-3.0], around_median=False) == {"centre": 0.0, "limit": 3.0}


def test_a_page_of_500_samples_of_128_tokens_stays_under_8_mb(tmp_path: Path) -> None:
    rows = token_samples.sample_rows(num_pairs=100, steps=range(1, 101), per_step=4)
    for row in rows:
        for text, record in (("response", "tokens"), ("reference_response", "reference_tokens")):
            if record not in row:
                continue
            row[record] = {
                name: (values * 128)[:128] if isinstance(values, list) else {} for name, values in row[record].items()
            }
            row[text] = "".join(row[record]["pieces"])
    html = render_html(run_of(tmp_path, rows))
    start = html.index('id="inspector-data">') + len('id="inspector-data">')
    data = json.loads(html[start : html.index("</script>", start)])
    assert (len(data["samples"]), data["numLeftOut"]) == (500, 0)
    assert {len(sample["actor"]["pieces"]) for sample in data["samples"]} == {128}
    assert 2_000_000 < len(html.encode()) < 8_000_000


def test_too_many_samples_are_thinned_by_whole_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = run_of(tmp_path, token_samples.sample_rows(num_pairs=2, steps=range(1, 11)), with_curves=True)
    whole = [len(script_json(sample_entry(sample))) for sample in record.samples]
    monkeypatch.setattr(inspector, "MAX_SAMPLE_BYTES", round(0.6 * sum(whole)))
    data = inspector_data(record)
    assert data is not None
    steps = [entry["step"] for entry in data["samples"] if entry["kind"] == "rollout"]
    assert steps == [2, 2, 4, 4, 6, 6, 8, 8, 10, 10]
    assert [entry["kind"] for entry in data["samples"]].count("evaluation") == 2
    assert data["numLeftOut"] == 10
    # With room for hardly anything the comparison is what stays.
    monkeypatch.setattr(inspector, "MAX_SAMPLE_BYTES", max(whole) + 50)
    assert [entry["kind"] for entry in entries(record)] == ["evaluation"]


def test_curves_beside_the_samples(tmp_path: Path) -> None:
    record = run_of(tmp_path, token_samples.sample_rows(num_pairs=1, steps=range(1, 3)), with_curves=True)
    data = inspector_data(record)
    assert data is not None
    (curve,) = data["curves"]
    assert (curve["title"], curve["unit"]) == ("KL", "nats per response")
    assert curve["lines"][0]["steps"][-1] == 60
    assert curve["lines"][0]["values"][-1] == 6.0


def cell(rate: float) -> dict[str, Any]:
    """An entry of a table of win rates."""
    return {"rate": rate, "ci": [rate - 0.05, rate + 0.05], "wins": 1}


def test_the_verdicts_of_judges_are_read_and_shown(tmp_path: Path) -> None:
    record = run_of(tmp_path, [])
    judge = {
        "judge": "gold",
        "win_rates": [[None, cell(0.3)], [cell(0.7), None]],
        "length_controlled_win_rates": [[None, cell(0.4)], [cell(0.6), None]],
    }
    content = {"players": ["start", "actor"], "judges": [judge, {"judge": "broken", "win_rates": 3}, 7]}
    (tmp_path / "evaluation-last.json").write_text(json.dumps(content))
    (tmp_path / "evaluation-best.json").write_text("{")
    (tmp_path / "summary.json").write_text(
        json.dumps({"score_length_controlled_win_rate": 0.8, "distinct_2": 0.3, "reference_distinct_2": 0.4})
    )
    record = read_run(tmp_path)
    (found,) = record.verdicts
    assert (found.judge, found.file, found.rate, found.controlled_rate) == ("gold", "evaluation-last.json", 0.7, 0.6)
    assert found.interval == pytest.approx((0.65, 0.75))
    assert record.problems == ("evaluation-best.json is not valid JSON; it is left out",)
    html = render_html(record).replace("\u00a0", " ")
    for text in ("65.0–75.0 %", "60.0 %", "Score win rate at equal length", "80.0 %", "Different word pairs", "30.0 %"):
        assert text in html
    assert verdicts(tmp_path / "nowhere", []) == ()
