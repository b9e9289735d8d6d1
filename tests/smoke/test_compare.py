"""`eval` with judges and `compare` on tiny runs, through the command line."""

import json
import re
import shutil
from pathlib import Path

import pytest
from chat_server import chat_server

from hydra_rlhf.reporting.comparison import render_html, render_markdown
from hydra_rlhf.stages.pipeline import run_recipe
from smoke.tiny_runs import command, environment, exit_code, recipe

RULE = "def words(prompts, responses):\n    return [len(r.split()) for r in responses]\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one recipe, a run with another setting from the first one's start, and one on other data."""
    folder = tmp_path_factory.mktemp("compared")
    first = run_recipe(recipe(folder, name="first"), until="ppo")
    run_recipe(recipe(folder, name="second", seed=1), until="ppo")
    run_recipe(recipe(folder, name="strict", ppo__kl_coef=0.5, start__hydra_sft=str(first / "hydra_sft")), until="ppo")
    rows = [{"prompt": f"where is cat {k}", "chosen": "on the mat", "rejected": f"dog {k}"} for k in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"train": str(folder / "pairs.jsonl"), "max_prompt_tokens": 32, "max_response_tokens": 16}
    run_recipe(recipe(folder, name="own", data=own), until="ppo")
    shutil.copytree(folder / "own", folder / "other")  # as if it had been run with another split
    settings = (folder / "other" / "recipe.yaml").read_text()
    assert "test_frac: 0.1" in settings
    (folder / "other" / "recipe.yaml").write_text(settings.replace("test_frac: 0.1", "test_frac: 0.3"))
    (folder / "house_rules.py").write_text(RULE)
    return folder


@pytest.fixture
def here(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(runs)
    monkeypatch.syspath_prepend(runs)
    return runs


def content(file: Path) -> dict:
    return json.loads(file.read_text())


def test_three_runs_and_their_starts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judges = ["--judge", "gold", "--judge", "reward-head", "--judge", "rule:house_rules:words"]
    assert exit_code("compare", "first", "second", "strict", "--num-prompts", "4", *judges, "--json", "out.json") == 0
    found = content(here / "out.json")
    # Two seeds are one player; the third run began where the first did; so there are two starts, of two players.
    players = {player["name"]: player for player in found["players"]}
    assert list(players) == ["start", "first", "strict"]
    assert players["start"]["runs"] == players["first"]["runs"] == ["first", "second"]
    assert players["strict"]["runs"] == ["strict"]
    assert players["start"]["kl"] is None
    assert players["first"]["kl"] is not None
    assert found["num_prompts"] == 4
    assert [judge["judge"] for judge in found["judges"]] == ["gold", "reward-head", "rule:house_rules:words"]
    for judge in found["judges"]:
        assert judge["strengths"][0]["strength"] == 0.0
        for i, row in enumerate(judge["win_rates"]):
            for j, cell in enumerate(row):
                assert (cell is None) == (i == j)
                assert cell is None or 0 <= cell["ci"][0] <= cell["rate"] <= cell["ci"][1] <= 1
    cell = found["judges"][2]["win_rates"][1][0]
    assert cell["wins"] + cell["ties"] + cell["losses"] == 2 * 2 * 4  # two actors, two starts, four prompts
    words = found["judges"][2]["mean_scores"]
    texts = [text for sample in found["samples"] for player, text in sample["responses"] if player == "strict"]
    assert words["strict"] == pytest.approx(sum(len(text.split()) for text in texts) / 4)
    page, plain, shown = (here / "out.html").read_text(), (here / "out.md").read_text(), capsys.readouterr().out
    for text in (page, plain, shown):
        for word in ("start", "first", "strict", "house_rules"):
            assert word in text.replace("\\", "")
    assert page.count("<svg") == 3
    assert "<script" not in page
    # Nothing in it depends on the time or on the order of hash tables.
    assert exit_code("compare", "first", "second", "strict", "--num-prompts", "4", *judges, "--json", "out2.json") == 0
    assert content(here / "out2.json") == found
    assert (here / "out2.html").read_text() == page


def test_equal_starts_are_one_and_best_of_n_is_a_player(here: Path) -> None:
    assert exit_code("compare", "first", "strict", "--num-prompts", "3", "--best-of", "3", "--judge", "gold") == 0
    found = content(here / "compare.json")
    assert [player["name"] for player in found["players"]] == ["start", "first", "strict", "best of 3"]
    assert found["players"][0]["runs"] == ["first"]
    assert found["players"][3]["kl_bound"] == pytest.approx(0.4319, abs=1e-4)  # ln 3 - 2/3
    assert (here / "compare.html").is_file()


def test_labels_make_players(here: Path) -> None:
    args = ["a=first", "b=second", "--num-prompts", "3", "--judge", "gold", "--json", "labels.json"]
    assert exit_code("compare", *args) == 0
    names = [player["name"] for player in content(here / "labels.json")["players"]]
    assert names == ["start of a", "start of b", "a", "b"]


def test_a_run_evaluated_by_judges(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judges = ["--judge", "reward-head", "--judge", "reward-head:second", "--best-of", "4", "--num-prompts", "4"]
    assert exit_code("eval", "first", *judges) == 0
    found = content(here / "first" / "evaluation-last.json")
    assert found["players"] == ["start", "actor", "best of 4"]
    own, other = found["judges"]
    assert own["judge"] == "reward-head"
    # The best of four by the reward head is at least as good as a sample, by that head, and mostly better.
    assert own["mean_scores"]["best of 4"] > own["mean_scores"]["start"]
    assert own["mean_scores"] != other["mean_scores"]
    # Read again as text, responses score as they did as sampled ids.
    assert own["mean_scores"]["actor"] == pytest.approx(found["score_mean"], abs=0.2)
    assert sum(points["num_pairs"] for points in found["reliability"]) == 8
    for name in ("reward_accuracy", "calibration_error", "score_win_rate", "gold_length_controlled_win_rate"):
        low, high = found[f"{name}_ci"]
        assert 0 <= low <= high <= 1
    assert 0 < found["distinct_1"] <= 1
    assert "best of 4" in capsys.readouterr().out


def test_a_model_behind_an_endpoint_judges_and_is_asked_once(here: Path) -> None:
    with chat_server() as server:
        judge = f"llm:judge@{server.url},prompt=summary"
        args = ["eval", "own", "--num-prompts", "2", "--judge", judge]
        assert exit_code(*args) == 0
        first, asked = content(here / "own" / "evaluation-last.json"), len(server.bodies)
        assert asked > 0
        assert exit_code(*args) == 0
        assert len(server.bodies) == asked
    again = content(here / "own" / "evaluation-last.json")["judges"][0]
    assert again["win_rates"] == first["judges"][0]["win_rates"]
    assert (again["asked"]["num_requests"], again["asked"]["num_cached"]) == (0, asked)
    assert list((here / "own" / "judge_cache").glob("*.json"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["own", "other"], "own and other hold out different prompts"),
        (["first", "own"], "hold out different prompts"),
        (["first", "first"], "is named twice"),
        (["nowhere"], "nowhere"),
        (["first", "--judge", "silver"], "there is no such judge"),
        (["own", "--judge", "gold"], "only the built-in world"),
        (["first", "--json", "out.txt"], "ends in .json"),
        (["first", "--json", "missing/out.json"], "a folder that exists"),
        (["first", "--json", "first/stages.json"], "no earlier comparison"),
        (["start=first"], "give such a run a label"),
    ],
)
def test_what_compare_refuses(args: list[str], words: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("compare", *args) == 2
    assert words in capsys.readouterr().err


def test_a_judge_that_is_not_there_is_a_failure(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["compare", "own", "--num-prompts", "1", "--json", "gone.json"]
    judge = "llm:m@http://127.0.0.1:9/v1,retries=0,timeout=1,cache=empty"
    assert exit_code(*args, "--judge", judge) == 1
    assert "gives no answer" in capsys.readouterr().err
    assert not (here / "gone.json").exists()


def test_the_report_shows_texts_as_texts(here: Path) -> None:
    evil = "<script>alert(1)</script> | `x` " + "y" * 3000
    cell = {"rate": 0.75, "ci": [0.5, 0.9], "wins": 3, "ties": 0, "losses": 1, "failed": 2}
    asked = dict.fromkeys(
        ("num_comparisons", "num_judged", "num_failed", "num_identical", "num_disagreements", "num_first_wins"), 3
    )
    asked |= dict.fromkeys(("num_second_wins", "num_requests", "num_cached", "prompt_tokens", "completion_tokens"), 1)
    judge = {
        "judge": evil,
        "win_rates": [[None, cell], [cell, None]],
        "length_controlled_win_rates": [[None, cell], [cell, None]],
        "strengths": [{"strength": 0.0, "ci": [0.0, 0.0]}, {"strength": -1.5, "ci": [-2.0, -1.0]}],
        "asked": asked | {"failures": {evil: 2}},
    }
    numbers = {"kl": None, "response_tokens_mean": 3.0, "response_characters_mean": 9.0, "eos_frac": 1.0}
    player = {"runs": [evil], "checkpoints": ["last"], "distinct_1": 0.5, "distinct_2": None, **numbers}
    comparison = {
        "players": [{"name": evil, **player}, {"name": "b", **player}],
        "num_prompts": 4,
        "seed": 0,
        "judges": [judge],
        "samples": [{"prompt": evil, "responses": [[evil, evil]]}],
    }
    page = render_html(comparison)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "3 wins, 0 ties, 1 losses, 2 not judged" in page
    assert "color-mix(in srgb, var(--blue) 28%" in page  # 55 % of a lead of 0.5
    assert re.search(r"75\.0\s*%\s*<small>50\.0–90\.0", page)
    plain = render_markdown(comparison)
    assert "\\<script\\>" in plain
    assert "75.0 % of the decided verdicts" in plain.replace("\u00a0", " ")


def test_help_says_everything_about_judges() -> None:
    import subprocess

    for name in ("eval", "compare"):
        done = subprocess.run(command(name, "--help"), capture_output=True, text=True, env=environment(), check=True)
        for word in ("gold", "reward-head:RUN", "classifier:PATH", "rule:module:function", "llm:MODEL@URL"):
            assert word in done.stdout
        for option in ("prompt=", "parallel=", "retries=", "timeout=", "temperature=", "max-tokens=", "cache=", "key="):
            assert option in done.stdout


def test_rouge_without_its_extra_says_what_to_install(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    assert exit_code("eval", "first", "--num-prompts", "1", "--rouge") == 2
    assert "pip install 'hydra-rlhf[eval]'" in capsys.readouterr().err
    shutil.rmtree(here / "empty", ignore_errors=True)
