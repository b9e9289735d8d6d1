"""The least work of a PPO step against numbers worked out by hand, and against a published-size example."""

import pytest

from hydra_rlhf.benchmark import work
from hydra_rlhf.model.roles import ROLES

# Per token: blocks 2 x 1000, LoRA 2 x 50, head 2 x 200 operations; attention 2 x 2 x 10 = 40 per token of length.
SMALL = {
    "block_params": 1000,
    "head_params": 200,
    "lora_params": 50,
    "decode_bytes": 5000,
    "lora_bytes": 100,
    "num_layers": 2,
    "query_width": 10,
    "cache_bytes": 8,
}
# Three sequences of 4 + 6: 30 tokens, 12 of them prompts, 18 of them responses; five decode steps after the prefill.
BATCH = {"num_sequences": 3, "prompt_tokens": 4, "response_tokens": 6}


def step(method: str, **changes: int) -> "work.Work":
    """The small model's work with a method."""
    return work.step_work(ROLES[method], work.ModelSizes(**SMALL), work.Batch(**BATCH | changes))


def test_generating():
    # A step reads 5000 + 100 of weights and 3 rows x 7 tokens x 8 bytes (4 prompt tokens, half of 6 response tokens).
    found = step("hydra-ppo")
    assert found.decode_bytes == 5 * (5100 + 168)
    # Per token 2 x (1000 + 200 + 50), and 4 x 2 layers x 10 x 7 keys and values.
    assert found.decode_flops == 5 * 3 * (2500 + 560)
    # 12 tokens with LoRA and attention over 4, and the head on the last one of each row.
    assert found.prefill_flops == 12 * (2100 + 160) + 3 * 400
    without_lora = step("ppo")
    assert without_lora.decode_bytes == 5 * (5000 + 168)
    assert without_lora.decode_flops == 5 * 3 * (2400 + 560)
    assert without_lora.prefill_flops == 12 * (2000 + 160) + 3 * 400


# One pass: 30 x (2000 + 400) operations with LoRA off, 30 x (2100 + 400) with LoRA on; the LM head 18 x 400 more.
OFF, ON, HEAD = 72000, 75000, 7200
# Backward: 30 x (2000 + 4 x 50 + 2.5 x 400) with a frozen base, 30 x (2 x 2000 + 2.5 x 400) where the trunk learns.
BACK_LORA, BACK_FULL = 96000, 150000


@pytest.mark.parametrize(
    ("method", "score", "learned", "backward"),
    [
        ("ppo", 4 * OFF + 2 * HEAD, 2 * OFF + HEAD, 2 * BACK_FULL + 2 * HEAD),
        ("lora-ppo", 2 * OFF + 2 * ON + 2 * HEAD, 2 * ON + HEAD, 2 * BACK_LORA + HEAD),
        ("d-lora-ppo", 2 * OFF + 2 * ON + 2 * HEAD, 2 * ON + HEAD, 2 * BACK_LORA + HEAD),
        ("j-hydra-ppo", OFF + ON + 2 * HEAD, ON + HEAD, BACK_LORA + HEAD),
        ("hydra-ppo", OFF + 2 * ON + 2 * HEAD, 2 * ON + HEAD, 2 * BACK_LORA + HEAD),
    ],
)
def test_learning(method: str, score: int, learned: int, backward: int):
    found = step(method)
    assert found.score_flops == score
    assert found.update_flops == learned + backward
    assert found.shared_flops == learned
    assert found.learn_flops == score + backward  # no forward is needed twice
    assert step(method, num_epochs=3).update_flops == 3 * (learned + backward)
    assert step(method, num_epochs=3).shared_flops == learned


def test_greedy_responses_are_decoded_and_scored_alone():
    # One prompt's greedy response more: a fourth row is decoded, and the reward model looks at 10 tokens more.
    plain, found = step("hydra-ppo"), step("hydra-ppo", num_greedy=1)
    assert found.decode_bytes == 5 * (5100 + 4 * 7 * 8)
    assert found.decode_flops == 5 * 4 * (2500 + 560)
    assert found.prefill_flops == 16 * (2100 + 160) + 4 * 400
    assert found.score_flops == plain.score_flops + 10 * (2000 + 400)
    assert (found.update_flops, found.shared_flops) == (plain.update_flops, plain.shared_flops)


def test_a_single_token_needs_no_decode_step():
    found = step("hydra-ppo", response_tokens=1)
    assert (found.decode_bytes, found.decode_flops) == (0, 0)


def test_the_slower_of_bandwidth_and_rate_bounds_decoding():
    found = work.Work(
        decode_bytes=600, decode_flops=40, prefill_flops=20, score_flops=30, update_flops=50, shared_flops=10
    )
    slow_memory = work.bound(found, bandwidth=100, matrix_rate=10)
    # 600 / 100 = 6 s against 40 / 10 = 4 s; prefill 2 s; scoring 3 s, updating 5 s of which 1 s was done in scoring.
    assert (slow_memory.generate_s, slow_memory.score_s, slow_memory.update_s) == (8, 3, 5)
    assert slow_memory.step_s == 15
    assert work.bound(found, bandwidth=300, matrix_rate=10).generate_s == 6


def test_llama_7b():
    # Rank 128 on q, k, v, o; 16 x (512 + 512); bfloat16 base: 219 TFLOP for a forward, prefill 109, scoring 665 (three
    # passes, of which the critic's needs no head), updating 915; 512 decode steps of 19.9 GB with bfloat16 LoRA sets.
    llama = work.ModelSizes(
        block_params=32 * (4 * 4096**2 + 3 * 4096 * 11008),
        head_params=32000 * 4096,
        lora_params=32 * 4 * 128 * 2 * 4096,
        decode_bytes=2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096),
        lora_bytes=2 * 32 * 4 * 128 * 2 * 4096,
        num_layers=32,
        query_width=4096,
        cache_bytes=524288,
    )
    batch = work.Batch(num_sequences=16, prompt_tokens=512, response_tokens=512)
    found = work.step_work(ROLES["hydra-ppo"], llama, batch)
    assert found.prefill_flops == pytest.approx(109e12, rel=0.01)
    assert found.score_flops == pytest.approx(665e12, rel=0.01)
    assert found.update_flops == pytest.approx(915e12, rel=0.01)
    assert found.decode_bytes == pytest.approx(511 * 19.9e9, rel=0.01)
    full = work.step_work(ROLES["ppo"], llama, batch)
    assert full.update_flops == pytest.approx(1313e12, rel=0.01)
    joined = work.step_work(ROLES["j-hydra-ppo"], llama, batch)
    assert (joined.score_flops, joined.update_flops) == pytest.approx((442e12, 457e12), rel=0.01)
