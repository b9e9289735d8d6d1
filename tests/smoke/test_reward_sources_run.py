"""A run with sources of every kind, two of which fail now and then: logged, masked, resumed, measured, reported."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from contract.tiny import LLAMA_LIKE, chat, ppo_config, prompts, tiny_hydra, tokenizer
from test_code_shape import documented_metrics
from transformers import LlamaConfig, LlamaForSequenceClassification

from hydra_rlhf.cli import recipe_with_overrides
from hydra_rlhf.config import RewardConfig
from hydra_rlhf.config_rewards import RegexSource
from hydra_rlhf.errors import RewardFunctionError
from hydra_rlhf.evaluation.evaluate import evaluate_again
from hydra_rlhf.reporting.render import render_report
from hydra_rlhf.runtime.run import Run, read_recipe
from hydra_rlhf.stages.pipeline import run_recipe
from hydra_rlhf.stages.ppo import train_ppo_stage
from hydra_rlhf.stages.scoring.kinds import open_sources
from hydra_rlhf.stages.session import Session
from smoke.tiny_runs import keys_of, metric_lines, recipe, write_recipe

FUNCTIONS = """
import time

def fails_on_some(prompts, responses, response_ids):
    return [None if sum(ids) % 5 == 0 else [0.1] * len(ids) for ids in response_ids]

def hangs(prompts, responses):
    time.sleep(1e6)
"""


class Service(BaseHTTPRequestHandler):
    """Counts letters, and refuses every fourth length."""

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        scores = [None if len(text) % 4 == 0 else float(len(text)) for text in sent["responses"]]
        body = json.dumps({"scores": scores}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source_functions.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)


def sources(folder: Path, url: str) -> list[dict[str, Any]]:
    """One source of every kind."""
    LlamaForSequenceClassification(LlamaConfig(**LLAMA_LIKE, num_labels=1)).save_pretrained(folder / "judge")
    tokenizer().save_pretrained(folder / "judge")
    function = {"function": "source_functions:fails_on_some", "isolate": True, "timeout_s": 30, "on_failure": "mask"}
    return [
        {"name": "short", "kind": "length", "maximum": 4, "unit": "words", "normalize": True, "weight": 0.5},
        {"name": "fresh", "kind": "repetition", "ngram": 2},
        {"name": "form", "kind": "regex", "pattern": "[a-z]", "whole": False},
        {"name": "words", "kind": "keywords", "wanted": ["the"], "unwanted": ["cat"]},
        {"name": "mine", "kind": "function", **function},
        {"name": "service", "kind": "http", "url": url, "on_failure": "value", "failure_value": -1.0, "weight": 0.01},
        {"name": "judge", "kind": "classifier", "path": str(folder / "judge"), "device": "cpu", "normalize": True},
    ]


def test_sources_of_every_kind(tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture) -> None:
    changes = {"ppo__reward": {"sources": sources(tmp_path, url), "max_failed_frac": 0.9}, "ppo__rollout_batch_size": 8}
    folder = run_recipe(recipe(tmp_path, ppo__num_logged_samples=8, evaluation={"num_prompts": 8}, **changes))
    assert keys_of(folder) <= documented_metrics()
    lines = [line for line in metric_lines(folder) if line["stage"] == "ppo"]
    names = ("head", "short", "fresh", "form", "words", "mine", "service", "judge")
    for line in lines:
        assert {f"reward/{name}_{what}" for name in names for what in ("mean", "std", "failed")} <= line.keys()
        assert line["reward/masked_frac"] == pytest.approx(line["reward/mine_failed"] / 8, abs=1e-6)
        assert line["optim/skipped_steps"] == 0
    assert sum(line["reward/mine_failed"] for line in lines) > 0
    assert sum(line["reward/service_failed"] for line in lines) > 0
    assert any("are left out: row" in message and "mine returned None" in message for message in caplog.messages)
    # What could not be scored has no score in samples and report, and the summary is of the rest.
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert sum(sample["score"] == "nan" for sample in samples if sample["kind"] == "rollout") == sum(
        line["reward/mine_failed"] for line in lines
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert isinstance(summary["score_mean"], float)
    assert 0 <= summary["score_win_rate"] <= 1
    assert render_report(folder).is_file()
    # The run measured again: the unit of normalised sources is the run's.
    again, _ = evaluate_again(folder, checkpoint="last", num_prompts=8)
    assert again["score_mean"] == pytest.approx(summary["score_mean"], abs=1e-6)


def test_a_source_of_the_recipe_can_be_changed_on_the_command_line(tmp_path: Path) -> None:
    listed = [{"name": "short", "kind": "length", "maximum": 4}, {"name": "form", "kind": "regex", "pattern": "a"}]
    file = write_recipe(tmp_path / "recipe.yaml", ppo__reward={"sources": listed, "reward_model_coef": 0.0})
    options = ["--ppo.reward.sources.0.weight", "2", "--ppo.reward.sources.1.no-whole", "--ppo.num-steps", "1"]
    changed = recipe_with_overrides(file, options)
    short, form = changed.ppo.reward.sources
    assert (short.weight, form.weight, changed.ppo.num_steps) == (2.0, 1.0, 1)
    assert isinstance(form, RegexSource)
    assert not form.whole
    for resume in (False, True):  # what the run folder keeps is the same recipe when it is read again
        with Run.open(changed, resume=resume) as run:
            assert read_recipe(run.folder) == changed


def test_a_function_that_hangs_ends_the_run_by_its_timeout() -> None:
    hanging = {"name": "slow", "kind": "function", "function": "source_functions:hangs", "isolate": True}
    listed = [hanging | {"timeout_s": 0.5, "on_failure": "mask"}]
    hydra = tiny_hydra("hydra-ppo")
    config = ppo_config(reward=RewardConfig(sources=listed))  # pyright: ignore
    message = r"8 of 8 responses .*slow took longer than timeout_s=0\.5"
    with open_sources(config.reward) as opened, pytest.raises(RewardFunctionError, match=message):
        train_ppo_stage(Session(), hydra, chat(hydra), prompts(), config, seed=0, reward_fn=opened)
