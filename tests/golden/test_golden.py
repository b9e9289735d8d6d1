"""The first steps of one tiny run against numbers written down earlier: whatever changes them is seen, and said.

    python tests/golden/test_golden.py --write     write them again, after a change that is meant to change numbers

Such a change belongs in CHANGELOG.md under "numbers change". Another processor may differ in the last bits of a sum, so
numbers are compared to a relative 2e-3; the code in this repository, rerun on one machine, repeats them exactly.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from hydra_rlhf.recipes import parse_recipe
from hydra_rlhf.stages.pipeline import run_recipe

TRACE = Path(__file__).with_name("hydra_ppo.json")
RELATIVE = 2e-3
ABSOLUTE = 1e-5
"""For numbers that are zero but for rounding."""
KEYS = {
    "hydra_sft": (
        "loss/total",
        "loss/sft",
        "loss/reward",
        "train/pair_accuracy",
        "train/margin",
        "train/num_tokens",
        "optim/grad_norm",
        "optim/learning_rate",
    ),
    "ppo": (
        "score/mean",
        "score/std",
        "reward/mean",
        "kl/reference",
        "kl/update",
        "kl/coef",
        "ppo/entropy",
        "ppo/clip_frac",
        "ppo/ratio_max",
        "response/tokens_mean",
        "response/eos_frac",
        "loss/policy",
        "loss/value",
        "optim/actor_grad_norm",
        "optim/critic_grad_norm",
        "optim/actor_learning_rate",
    ),
}
SETTINGS: dict[str, Any] = {
    "name": "golden",
    "method": "hydra-ppo",
    "seed": 7,
    "data": {"train": "world", "world_pairs": 54, "max_prompt_tokens": 48, "max_response_tokens": 32},
    "model": {"path": "scratch:tiny", "scratch_vocab_size": 320, "device": "cpu"},
    "lora": {"rank": 4, "alpha": 8.0},
    "hydra_sft": {
        "batch_size": 16,
        "learning_rate": 3e-3,
        "warmup_frac": 0.0,
        "reward_loss_coef": 0.5,
        "eval_every": 0,
    },
    "ppo": {
        "num_steps": 3,
        "rollout_batch_size": 8,
        "minibatch_size": 4,
        "actor_learning_rate": 3e-3,
        "critic_learning_rate": 3e-3,
        "value_head_learning_rate": 3e-3,
        "kl_target": 1.0,
        "kl_horizon": 100,
        "sampling": {"max_response_tokens": 12},
        "eval_every": 0,
    },
    "runtime": {"num_threads": 1},
}


def trace(folder: Path) -> list[dict[str, Any]]:
    """The key metrics of three steps of each stage, rounded to four significant digits."""
    run = run_recipe(parse_recipe({**SETTINGS, "output_dir": str(folder)}, source="golden"), until="ppo")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {"stage": line["stage"], "step": line["step"], **{key: rounded(line[key]) for key in KEYS[line["stage"]]}}
        for line in lines
    ]


def rounded(number: float) -> float:
    """Four significant digits."""
    return float(f"{number:.4g}")


def test_the_first_steps_are_those_written_down(tmp_path: Path) -> None:
    expected = json.loads(TRACE.read_text())
    found = trace(tmp_path)
    assert [(line["stage"], line["step"]) for line in found] == [
        (stage, step) for stage in ("hydra_sft", "ppo") for step in (1, 2, 3)
    ]
    wrong = [
        f"{line['stage']} step {line['step']} {key}: {line[key]}, written down {before.get(key)}"
        for line, before in zip(found, expected, strict=True)
        for key in KEYS[line["stage"]]
        if line[key] != pytest.approx(before.get(key), rel=RELATIVE, abs=ABSOLUTE)
    ]
    assert not wrong, "\n".join(["numbers have changed; if they should, see the top of this file:", *wrong])


def test_the_trace_could_show_a_change() -> None:
    """Nothing in it is empty or constant: stage 1 learns, and the actor leaves the reference."""
    lines = json.loads(TRACE.read_text())
    sft, ppo = ([line for line in lines if line["stage"] == stage] for stage in KEYS)
    assert [line["loss/total"] for line in sft] == sorted((line["loss/total"] for line in sft), reverse=True)
    assert abs(ppo[2]["kl/reference"]) > 100 * ABSOLUTE
    for stage_lines, keys in ((sft, ("loss/sft", "optim/grad_norm")), (ppo, ("score/mean", "loss/value", "kl/coef"))):
        for key in keys:
            assert len({line[key] for line in stage_lines}) == 3, key


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", required=True, help=f"replace {TRACE.name}")
    parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        TRACE.write_text(json.dumps(trace(Path(place)), indent=1) + "\n")
    print(TRACE.read_text())
