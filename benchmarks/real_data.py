"""The whole pipeline on small cuts of published preference data, with a scratch model: does it run, does it learn?

    python benchmarks/real_data.py --data DATA_FOLDER --out benchmarks/results/real_data.json

DATA_FOLDER holds train.jsonl and test.jsonl in a folder for each name in `CONVERTED`, and the files of `RAW`.
A model of under a million parameters cannot learn English from a thousand replies: read the scores, not the texts.
"""

import argparse
import contextlib
import io
import json
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from hydra_rlhf.cli import main as command_line
from hydra_rlhf.config import (
    DataConfig,
    EvaluationConfig,
    HydraSFTConfig,
    ModelConfig,
    PPOConfig,
    Recipe,
    RuntimeConfig,
    SamplingConfig,
)
from hydra_rlhf.data.check import check_file
from hydra_rlhf.stages.pipeline import run_recipe

CONVERTED = ("hh_helpful", "gpt4_llm", "tldr", "stack_exchange")
RAW = {
    "hh_helpful": "raw/dsp/helpful.json",
    "gpt4_llm": "raw/gpt4_llm/comparison_gpt4_data_en.json",
    "tldr": "raw/tldr/oai1b_judged.csv",
    "stack_exchange": "raw/stack_exchange/stack_exchange_paired_tiny.json",
}
NUM_EPOCHS = {"hh_helpful": 2.0, "gpt4_llm": 3.0, "tldr": 4.0, "stack_exchange": 2.0}
"""Passes over the pairs in stage 1: more where there are fewer."""
RESPONSE_TOKENS = {"hh_helpful": 96, "gpt4_llm": 96, "tldr": 96, "stack_exchange": 192}
"""Where responses of the data are cut: further on where they are longer."""
NOT_SHOWN = {"gpt4_llm": "not shown: CC BY-NC"}
"""Sets whose text must not be passed on."""
PROMPTS_SHOWN = ("hh_helpful",)
"""Sets whose licence (MIT) lets prompts be shown without naming an author for each."""
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".gz")
SHOWN_CHARACTERS = 300
NUM_SHOWN = 2


def recipe(name: str, data: DataConfig, folder: Path, *, fast: bool) -> Recipe:
    """One run; the same settings for every set but for epochs and length."""
    data_set = name.removesuffix("-raw")
    return Recipe(
        name=name,
        output_dir=str(folder),
        data=replace(data, max_prompt_tokens=96, max_response_tokens=RESPONSE_TOKENS[data_set]),
        model=ModelConfig(path="scratch:tiny", scratch_vocab_size=1024, device="cpu"),
        hydra_sft=HydraSFTConfig(
            num_epochs=0.5 if fast else NUM_EPOCHS[data_set],
            learning_rate=2e-3,
            batch_size=16,
            reward_loss_coef=1.0,
            weight_decay=0.1,
            eval_every=0,
            save_every=0,
        ),
        ppo=PPOConfig(
            num_steps=4 if fast else 32,
            rollout_batch_size=4 if fast else 32,
            minibatch_size=4 if fast else 16,
            kl_coef=0.02,
            actor_learning_rate=1e-3,
            critic_learning_rate=1e-3,
            value_head_learning_rate=1e-3,
            sampling=SamplingConfig(max_response_tokens=32),
            eval_every=0,
            save_every=0,
        ),
        evaluation=EvaluationConfig(num_prompts=16 if fast else 128, num_samples=NUM_SHOWN),
        runtime=RuntimeConfig(num_threads=1),
    )


def check_all(data: Path) -> list[dict[str, Any]]:
    """`hydra-rlhf data check` on every data file below `data`: exit code and what it counted. No text of any row."""
    checks: list[dict[str, Any]] = []
    for file in sorted(path for path in data.rglob("*") if path.suffix in DATA_SUFFIXES):
        exit_code = 0
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                exit_code = command_line(["data", "check", str(file)])
            except SystemExit as stop:
                exit_code = stop.code
        report = check_file(file)
        counts: dict[str, Any] = {}
        if report.rows is not None:
            rows = report.rows
            counts = {
                "format": rows.format,
                "rows_read": rows.rows_read,
                "rows_used": len(rows),
                "dropped": rows.dropped,
                "bad_rows": len(rows.bad_rows),
                "longer_wins": report.longer_wins,
            }
        checks.append({"file": file.relative_to(data).as_posix(), "exit_code": exit_code, **counts})
    return checks


def measure(name: str, settings: Recipe) -> dict[str, Any]:
    """Run a recipe and take its numbers from the run folder."""
    started = time.monotonic()
    run = run_recipe(settings)
    seconds = time.monotonic() - started
    summary, data = (json.loads((run / file).read_text(encoding="utf-8")) for file in ("summary.json", "data.json"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ppo = [line for line in lines if line["stage"] == "ppo"]
    scores, kl = ([float(line[key]) for line in ppo] for key in ("score/mean", "kl/reference"))
    return {
        "rows": {
            split: {key: data[split][key] for key in ("rows_read", "rows_used", "dropped", "cut")} for split in data
        },
        **{key: summary[key] for key in ("reward_accuracy", "longer_wins_accuracy", "perplexity", "calibration_error")},
        "ppo_steps": len(ppo),
        "score_first_5": statistics.fmean(scores[:5]),
        "score_last_5": statistics.fmean(scores[-5:]),
        "kl_first": kl[0],
        "kl_last": kl[-1],
        "kl_max": max(kl),
        "held_out": {
            key: summary[key]
            for key in (
                "num_prompts",
                "score_mean",
                "reference_score_mean",
                "score_win_rate",
                "score_win_rate_ci",
                "kl",
                "response_tokens_mean",
                "reference_response_tokens_mean",
                "eos_frac",
            )
        },
        "seconds": seconds,
        "samples": NOT_SHOWN.get(name) or samples(run, show_prompts=name in PROMPTS_SHOWN),
    }


def samples(run: Path, *, show_prompts: bool) -> list[dict[str, Any]]:
    """Before and after on held-out prompts, cut; where prompts are not shown, their number in the test split."""
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        {
            "prompt": line["prompt"][-SHOWN_CHARACTERS:] if show_prompts else line["prompt_index"],
            "before": line["reference_response"][:SHOWN_CHARACTERS],
            "before_score": line["reference_score"],
            "after": line["response"][:SHOWN_CHARACTERS],
            "after_score": line["score"],
        }
        for line in lines
        if line["kind"] == "evaluation"
    ]


def main() -> None:
    """Check every file, run every set from its converted and its raw file, write one JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--only", choices=CONVERTED, action="append", help="one set (repeatable; default: all)")
    parser.add_argument("--fast", action="store_true", help="a few small steps: shows that it runs, measures nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names: list[str] = args.only or list(CONVERTED)
    converted: dict[str, Any] = {}
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="real-data-") as temporary:
        folder = Path(temporary)
        for name in names:
            files = DataConfig(train=str(args.data / name / "train.jsonl"), test=str(args.data / name / "test.jsonl"))
            converted[name] = measure(name, recipe(name, files, folder, fast=args.fast))
            print(name, json.dumps({key: converted[name][key] for key in converted[name] if key != "samples"}))
            one_file = DataConfig(train=str(args.data / RAW[name]), test_frac=0.2)
            numbers = measure(name, recipe(f"{name}-raw", one_file, folder, fast=True))
            raw[name] = {"file": RAW[name], **{key: numbers[key] for key in ("rows", "ppo_steps", "kl_max", "seconds")}}
    settings = recipe(names[0], DataConfig(), Path("."), fast=args.fast)
    result = {
        "converted": converted,
        "raw": raw,
        "data_check": check_all(args.data),
        "settings": {
            "model": settings.model.path,
            "scratch_vocab_size": settings.model.scratch_vocab_size,
            "max_prompt_tokens": settings.data.max_prompt_tokens,
            "max_response_tokens": {name: RESPONSE_TOKENS[name] for name in names},
            "hydra_sft": asdict(settings.hydra_sft) | {"num_epochs": {name: NUM_EPOCHS[name] for name in names}},
            "ppo": asdict(settings.ppo),
            "seed": settings.seed,
            "fast": args.fast,
        },
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
