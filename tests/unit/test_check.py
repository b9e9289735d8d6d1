"""The report about a file: counts, lengths, the length baseline, and whether a run could start."""

import json
import subprocess
import sys

import pytest

from hydra_rlhf.config import DataConfig
from hydra_rlhf.data.check import check_file, data_summary, longer_wins, render_report
from hydra_rlhf.data.formats import CutCounts, TokenizedDemonstration, TokenizedPair, TokenizedPrompt
from hydra_rlhf.data.rows import BadRow, Demonstration, PreferencePair, Rows
from hydra_rlhf.data.scratch_tokenizer import scratch_tokenizer
from hydra_rlhf.data.world import world_pairs
from hydra_rlhf.errors import ConfigError

ROWS = [
    {"prompt": "What is it?", "chosen": "It is long, this one.", "rejected": "Short."},
    {"prompt": "Who?", "chosen": "Me.", "rejected": "Someone else here."},
    {"prompt": "Who?", "chosen": "You", "rejected": "She"},
    {"prompt": "Who?", "chosen": "You\nand I", "rejected": "Us."},
]


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_longer_wins_counts_ties_half():
    # Longer chosen, shorter chosen, equal, longer chosen: (1 + 0 + 0.5 + 1) / 4.
    pairs = [PreferencePair(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS]
    assert longer_wins(pairs) == 0.625
    assert longer_wins([Demonstration("p", "a")]) is None
    assert longer_wins([]) is None


def test_a_good_file(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *ROWS, ROWS[0], {"prompt": "p", "chosen": "x", "rejected": "x"})
    report = check_file(path)
    assert report.ok
    assert report.longer_wins == 0.625
    # Prompts have 11, 4, 4, 4 characters and 3, 1, 1, 1 words; chosen 21, 3, 3, 9 and 5, 1, 1, 3.
    assert report.lengths["prompt, characters"] == {"p10": 4, "p50": 4, "p90": 11, "max": 11}
    assert report.lengths["chosen, words"] == {"p10": 1, "p50": 1, "p90": 5, "max": 5}
    text = render_report(report)
    for part in (
        f"source       {path}",
        "format       pairs: ",
        "rows         6 read -> 4 pairs, 2 different prompts",
        "dropped      duplicate 1, equal_sides 1",
        "bad rows     none",
        "longer wins  62.5 %",
        "  1 chosen    It is long, this one.",
        "  3 rejected  She",
        "ok: a run can use this as data.train",
    ):
        assert part in text
    assert "  4 prompt" not in text, "three example rows"
    assert "tokens" not in text


def test_the_built_in_world_is_checked_as_a_run_draws_it():
    report = check_file("world", DataConfig(world_pairs=40, test_frac=0.25), seed=3)
    assert report.ok
    assert report.rows is not None
    train, test = world_pairs(40, 3, 0.25)
    assert report.rows.rows == [*train, *test]
    assert len(test) == 10
    text = render_report(report)
    assert "source       world, the built-in one: data.world_pairs=40, 10 of them held out, seed=3" in text
    assert "rows         40 read -> 40 pairs, 40 different prompts" in text
    assert "  1 prompt    Stock note: " in text
    assert "ok: a run can use this as data.train" in text


def test_bad_rows_are_listed_and_decide(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl", *ROWS, *[{"prompt": f"p{i}", "chosen": None, "rejected": "r"} for i in range(12)]
    )
    report = check_file(path)
    assert not report.ok
    assert report.rows is not None
    assert len(report.rows.bad_rows) == 12
    text = render_report(report)
    assert f"  {path}:5: field 'chosen' is null\n" in text
    assert f"  {path}:14: field 'chosen' is null\n  ... and 2 more" in text
    assert "PROBLEM: 12 bad rows; correct them, or set data.on_bad_row=skip" in text
    assert check_file(path, DataConfig(on_bad_row="skip")).ok


def test_files_that_cannot_be_used_at_all(tmp_path):
    equal = jsonl(tmp_path / "a.jsonl", {"prompt": "p", "chosen": "x", "rejected": "x"})
    assert check_file(equal).problem == "none of the 1 rows can be used"
    for report in (check_file(jsonl(tmp_path / "b.jsonl", {"x": 1})), check_file(tmp_path / "none.jsonl")):
        assert not report.ok
        assert report.rows is None
        assert "PROBLEM: " in render_report(report)
    with pytest.raises(ConfigError, match=r"data\.format='par' .* did you mean pairs"):
        check_file(equal, DataConfig(format="par"))


def test_demonstrations_and_prompts_are_reported_too(tmp_path):
    report = check_file(
        jsonl(tmp_path / "a.jsonl", {"messages": [{"role": r, "content": r} for r in ("user", "assistant")]})
    )
    assert report.ok
    assert report.longer_wins is None
    text = render_report(report)
    assert "1 read -> 1 demonstrations" in text
    assert "  1 response  assistant" in text
    assert "longer wins" not in text
    assert "1 read -> 1 prompts" in render_report(check_file(jsonl(tmp_path / "b.jsonl", {"prompt": "p"})))


def test_examples_are_one_line_each(tmp_path):
    row = {"prompt": "a\nb\t\x1b[31m", "chosen": "x" * 500, "rejected": "[bold]r[/bold]"}
    text = render_report(check_file(jsonl(tmp_path / "a.jsonl", row)))
    assert "  1 prompt    a\\nb\\t\\x1b[31m\n" in text
    assert "  1 chosen    " + "x" * 107 + "...\n" in text
    assert "\x1b" not in text


def test_tokens_are_counted_where_a_tokenizer_is_given(tmp_path):
    tokenizer = scratch_tokenizer(["no merges"], 259)
    path = jsonl(tmp_path / "a.jsonl", *ROWS)
    # One id a byte; prompts with BOS: 12, 5, 5, 5; responses with EOS: 22, 4, 4, 10 and 7, 19, 4, 4.
    report = check_file(path, DataConfig(max_prompt_tokens=11, max_response_tokens=18), tokenizer)
    assert report.lengths["prompt, tokens"] == {"p10": 5, "p50": 5, "p90": 11, "max": 11}
    assert report.lengths["response, tokens"] == {"p10": 4, "p50": 4, "p90": 18, "max": 18}
    assert report.cuts == CutCounts(prompt_tokens_cut=1, response_tokens_cut=2)
    assert "cut          1 rows lose prompt tokens, 2 response tokens; 0 pairs are equal" in render_report(report)


def test_the_summary_of_a_run():
    rows = Rows(
        rows=[
            PreferencePair("p", "long", "x"),
            PreferencePair("q", "y", "long"),
            PreferencePair("q", "same1", "same2"),
        ],
        source="a.jsonl",
        format="pairs",
        rows_read=9,
        dropped={"tie": 4},
        bad_rows=[BadRow("a.jsonl", 1, "is broken"), BadRow("a.jsonl", 2, "is broken")],
    )
    tokenized = [TokenizedPair([1, 2], [3, 4], [5]), TokenizedPair([1], [3], [5, 6, 7])]
    assert data_summary(rows, tokenized, CutCounts(1, 2, 1)) == {
        "source": "a.jsonl",
        "format": "pairs",
        "rows_read": 9,
        "rows_used": 2,
        "dropped": {"tie": 4, "bad_row": 2, "equal_after_cut": 1},
        "cut": {"prompt_tokens_cut": 1, "response_tokens_cut": 2},
        "longer_wins": 0.5,
        "prompt_tokens": {"p10": 1, "p50": 1, "p90": 2, "max": 2},
        "response_tokens": {"p10": 1, "p50": 1, "p90": 3, "max": 3},
    }
    assert rows.dropped == {"tie": 4}


def test_summaries_of_other_data():
    rows = Rows(rows=[Demonstration("p", "a")], source="a.jsonl", format="demonstrations", rows_read=1)
    summary = data_summary(rows, [TokenizedDemonstration([1, 2], [3])], CutCounts())
    assert summary["response_tokens"] == {"p10": 1, "p50": 1, "p90": 1, "max": 1}
    assert summary["longer_wins"] is None
    assert data_summary(rows, [TokenizedPrompt([1], "p")], CutCounts())["response_tokens"] == {}


# The share of pairs that the READMEs of the data give for "right if the longer always wins", in per cent.
LONGER_WINS = {
    "hh_helpful/test.jsonl": 60.0,
    "hh_helpful/train.jsonl": 59.5,
    "hh_harmless/test.jsonl": 44.0,
    "hh_harmless/train.jsonl": 45.3,
    "gpt4_llm/test.jsonl": 93.1,
    "gpt4_llm/train.jsonl": 90.2,
    "stack_exchange/test.jsonl": 65.0,
    "stack_exchange/train.jsonl": 66.9,
    "tldr/test.jsonl": 72.0,
    "tldr/train.jsonl": 68.5,
}


@pytest.mark.parametrize("name", LONGER_WINS)
def test_the_length_baseline_of_real_data(shared_dir, name):
    report = check_file(shared_dir / "data" / name)
    assert report.ok
    assert report.longer_wins is not None
    assert round(100 * report.longer_wins, 1) == pytest.approx(LONGER_WINS[name], abs=0.051)


def test_every_real_file_can_be_used(shared_dir):
    suffixes = (".json", ".jsonl", ".jsonl.gz", ".csv")
    files = [path for path in sorted((shared_dir / "data").rglob("*")) if path.name.endswith(suffixes)]
    assert len(files) >= 20
    assert {path.name: report.problem for path in files if not (report := check_file(path)).ok} == {}


def test_checking_a_file_loads_nothing_heavy(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *ROWS)
    code = (
        "import sys; from hydra_rlhf.data.check import check_file; assert check_file(sys.argv[1]).ok; "
        "print(*sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
