"""The written parts of the benchmarks: what the story rule counts, which openings are held out, what is not shown."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import memory
import memory_kept
import memory_peers
import memory_tensors
import memory_workload
import real_data
import stories
import story_openings
import story_rule

from hydra_rlhf.data.formats import TokenizedDemonstration
from hydra_rlhf.recipes import load_recipe

PEERS = Path(memory_workload.HERE) / "peers"
WORKLOAD = memory_workload.Workload(shape="30m", batch=2, response=8, micro=2, rank=4, updates=3)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("He ran.", 0),
        # happy, friend, hug in the last two sentences.
        ("They cried. He was happy. His friend gave him a hug!", 3),
        # Only the last two complete sentences count: `sad` (-1); `happy` is too early, `glad` is not finished.
        ("He was happy. He went home. Tom was sad. Then he was glad", -1),
        # A word counts once: happy.
        ("He was happy, happy, happy. Happy Tom was happy.", 1),
        # happy, glad, love, fun are four, held at three.
        ("So happy and glad. Love and fun.", 3),
        # Inside quotes and in capitals: thank (+1), sad and scared (-2).
        ('"Thank you!" Tom, sad and SCARED, said.', -1),
        ("no end", 0),
        ("", 0),
    ],
)
def test_happy_ending(text: str, value: int):
    assert story_rule.happy_ending(text) == value


def test_the_rule_gives_no_word_two_meanings():
    assert not story_rule.HAPPY & story_rule.SAD


def test_openings_hold_no_word_of_the_rule():
    words = {
        word for group in story_openings.openings() for opening in group for word in opening.lower().rstrip(".").split()
    }
    assert not words & (story_rule.HAPPY | story_rule.SAD)


def test_splits_of_openings_are_disjoint_and_change_with_the_seed():
    splits = story_openings.split_openings(0, 60, 20, 10)
    assert [len(split) for split in splits] == [60, 20, 10]
    assert len({opening for split in splits for opening in split}) == 90
    assert splits == story_openings.split_openings(0, 60, 20, 10)
    assert splits != story_openings.split_openings(1, 60, 20, 10)


def test_balanced_pairs_say_nothing_by_their_length():
    # Better minus worse: (0, 1) +7, (2, 3) -8, (4, 5) +9, (6, 7) +30; the first two are of one bin and of either sign.
    lengths = [107, 100, 100, 108, 109, 100, 130, 100]
    pairs = [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert stories.balance_lengths(pairs, lengths) == [(0, 1), (2, 3)]
    assert stories.longer_wins_share([7, -8, 0, 1]) == 0.625


def test_distinct_2():
    # the cat, cat sat | the cat, cat ran: 4 pairs, 3 different.
    assert stories.distinct_2(["The cat sat.", "the cat ran"]) == 0.75


def test_text_of_a_non_commercial_set_is_not_written():
    assert isinstance(real_data.NOT_SHOWN["gpt4_llm"], str)
    assert not set(real_data.PROMPTS_SHOWN) & set(real_data.NOT_SHOWN)


def test_every_data_file_is_checked_without_its_text(tmp_path: Path):
    (tmp_path / "good.jsonl").write_text('{"prompt": "a", "chosen": "zebra", "rejected": "c"}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "zebra", "rejected": "c"}\n{"prompt": "a"}\n')
    (tmp_path / "README.md").write_text("zebra")
    checks = real_data.check_all(tmp_path)
    assert [(check["file"], check["exit_code"], check["bad_rows"]) for check in checks] == [
        ("bad.jsonl", 2, 1),
        ("good.jsonl", 0, 0),
    ]
    assert "zebra" not in str(checks)


def test_the_peers_scripts_are_byte_for_byte_what_their_readme_says():
    named = re.findall(r"^\| `(\w+\.py)` .*`([0-9a-f]{64})` \|$", (PEERS / "README.md").read_text("utf-8"), re.M)
    assert len(named) == 3
    assert dict(named) == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in PEERS.glob("*.py")}


def test_the_recipe_of_the_memory_benchmark_is_the_peers_workload(tmp_path: Path):
    settings = memory_workload.recipe(tmp_path, WORKLOAD, checkpointing="auto", budget="2GiB", name="run")
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    # Two rows of 64 prompt and 8 response tokens are 144 tokens; alpha is twice the rank, as in the peers' scripts.
    assert recipe.ppo.micro_batch_tokens == 144
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets) == (4, 8.0, ("all-linear",))
    assert (recipe.ppo.num_steps, recipe.ppo.num_epochs, recipe.ppo.minibatch_size) == (3, 1, 2)
    assert recipe.ppo.sampling.min_response_tokens == recipe.ppo.sampling.max_response_tokens == 8
    assert recipe.ppo.reward.reward_model_coef == 1.0  # the reward forward is paid for, as by TRL
    assert (recipe.memory.checkpointing, recipe.memory.budget) == ("auto", "2GiB")
    assert recipe.ppo.actor_learning_rate == recipe.ppo.critic_learning_rate == 1e-5


def test_peer_options_name_every_number():
    assert WORKLOAD.peer_options() == (
        ["--updates", "3", "--batch", "2", "--response", "8", "--micro", "2", "--rank", "4"]
    )


def step(seconds: float, tokens: float = 8.0) -> dict[str, float]:
    """A logged PPO step."""
    times = {f"time/{phase}_s": seconds * share for phase, share in (("step", 1), ("rollout", 0.5), ("score", 0.2))}
    return {**times, "time/update_s": 0.3 * seconds, "response/tokens_mean": tokens, "memory/retries": 0.0}


def test_seconds_per_sample_leave_the_first_step_out():
    # Steps of 90, 4 and 6 s with 2 samples each: the median of 4 and 6 is 5, so 2.5 s per sample, half of it rollout.
    seen = memory_peers.read_steps([step(90), step(4), step(6)], WORKLOAD)
    assert (seen["s_per_sample"], seen["rollout_s"], seen["update_s"]) == pytest.approx((2.5, 1.25, 0.75))
    assert seen["memory_metrics"] == {"memory/retries": 0.0}


def test_short_responses_are_no_fair_run():
    with pytest.raises(SystemExit, match="not 8 each"):
        memory_peers.read_steps([step(1), step(1, tokens=7.5)], WORKLOAD)


def test_ratios_of_medians_and_of_the_worst_pair():
    def runs(*numbers: tuple[float, float]) -> list[dict[str, Any]]:
        return [{"peak_rss_mib": peak, "s_per_sample": seconds} for peak, seconds in numbers]

    found = memory_peers.summarise(
        {"hydra-none": runs((20, 1), (30, 3), (22, 2)), "trl-lora": runs((100, 4), (110, 8), (90, 5))}
    )
    # Medians 22 and 100, 2 s and 5 s; the worst pair is 30 against 90. Only pairs of us and a peer are compared.
    assert found["ratios"] == [
        {
            "hydra": "hydra-none",
            "peer": "trl-lora",
            "peak_ratio": pytest.approx(0.22),
            "worst_peak_ratio": pytest.approx(1 / 3),
            "time_ratio": pytest.approx(0.4),
            "bar": 0.25,
        }
    ]


def test_a_process_is_measured_from_outside():
    # 64 MiB of ones are held once; the interpreter takes some 10 MiB, this test with torch far more. So the measuring
    # process must be a small one, as the benchmark's is: the kernel counts it until the measured program begins.
    measured = "x = bytearray(b'1') * (64 * 2**20); print('noise'); print('{}')"
    measuring = (
        "import sys; from memory_workload import last_json, run_measured\n"
        f"found = run_measured([sys.executable, '-c', {measured!r}], threads=1)\n"
        "print(found.peak_rss_mib, last_json(found.output))"
    )
    done = subprocess.run(
        [sys.executable, "-c", measuring], cwd=memory_workload.HERE, capture_output=True, text=True, check=True
    )
    peak, said = done.stdout.split()
    assert said == "{}"
    assert 64 < float(peak) < 128


def test_the_measuring_process_stays_small():
    code = "import sys, memory; print([name for name in ('torch', 'numpy', 'hydra_rlhf') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=memory_workload.HERE, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_process_that_fails_says_why():
    with pytest.raises(SystemExit, match="no such thing"):
        memory_workload.run_measured([sys.executable, "-c", "raise ValueError('no such thing')"], threads=1)


@pytest.mark.parametrize(
    ("targets", "units"),
    # Llama-7B, mlp / hidden = 2.6875: 1 + 1 + 1 + 1 + 2 + 1 + 2 * 2.6875 + 4 * 128 / 4096; all linears add the second
    # normed input and three more low-rank activations.
    [("q,k,v,o", 12.5), ("all-linear", 12.5 + 1 + 3 / 32)],
)
def test_ideal_of_what_a_layer_keeps(targets: str, units: float):
    assert memory_kept.ideal_units(memory_kept.SHAPES["llama-7b"], targets) == units


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", memory_kept.TARGETS)
def test_a_layer_keeps_little_more_than_the_ideal(targets: str, dtype: torch.dtype):
    shape = memory_kept.SHAPES["llama-7b / 16"]
    units = memory_kept.units_kept("ours", shape, targets, dtype, "cpu")
    assert 1.0 <= units / memory_kept.ideal_units(shape, targets) <= memory.KEPT_BAR


def test_responses_of_full_sft_are_as_long_as_those_of_ppo():
    example = TokenizedDemonstration([1, 2], [3, 4, 5])
    assert memory_tensors.full_length(example, WORKLOAD).response_ids == [3, 4, 5, 3, 4, 5, 3, 4]
