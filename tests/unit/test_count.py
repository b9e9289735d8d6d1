"""What a method holds, counted from its table, by hand numbers; and what single tensors take with each optimizer."""

from collections.abc import Sequence
from dataclasses import asdict

import pytest

from hydra_rlhf.memory import count
from hydra_rlhf.memory.sizes import part, state_bytes
from hydra_rlhf.model.roles import ROLES, STAGE1_TABLES, without_roles


def piece(num: int) -> count.Part:
    """A part whose four sizes tell them apart."""
    return count.Part(num_bytes=num, gradient_bytes=2 * num, stepping_bytes=4 * num, optimizer_bytes=8 * num)


def numbers(parts: Sequence[object]) -> list[dict[str, int]]:
    """What parts say, to compare them by; the mutation check runs this file against a second module's classes."""
    return [asdict(part) for part in parts]  # pyright: ignore[reportArgumentType]


SIZES = count.BaseSizes(trunk=piece(1000), lm_head=piece(300), lora=piece(10), scalar_head=piece(1), below_bytes=7)
PARTS = ("trunks", "adapters", "heads", "gradients", "optimizer", "total")
EXPECTED = {
    # Four trunks; critic and reward have no LM head (700 each). Two scalar heads. Actor or critic learns at a time:
    # 2 x 1000 of the actor; 8 x (1000 + 700 + 1) of state. One set below each trunk: 7 each.
    "ppo": (3400, 28, 2, 2000, 13608),
    # The same trunks, two sets of 10; a learning pass is 10, the critic's has its head: 2 x 11; 8 x (10 + 10 + 1).
    "lora-ppo": (3400, 48, 2, 22, 168),
    "d-lora-ppo": (1700, 34, 2, 22, 168),
    # One set and one pass for both: 2 x (10 + 1), 8 x (10 + 1).
    "j-hydra-ppo": (1000, 17, 2, 22, 88),
    "hydra-ppo": (1000, 27, 2, 22, 168),
    # One set, one pass, no scalar head: 2 x 10, 8 x 10.
    "dpo": (1000, 17, 0, 20, 80),
    "simpo": (1000, 17, 0, 20, 80),
}


@pytest.mark.parametrize("method", list(ROLES))
def test_bytes_of_each_method(method: str):
    counted = count.count_method(ROLES[method], SIZES)
    expected = EXPECTED[method]
    assert tuple(getattr(counted, name) for name in PARTS) == (*expected, sum(expected))


def test_a_table_without_a_reward_role_has_one_head_less():
    counted = count.count_method(without_roles(ROLES["hydra-ppo"], "reward"), SIZES)
    assert (counted.trunks, counted.adapters, counted.heads) == (1000, 27, 1)
    # lora-ppo then has three trunks: the critic's without an LM head.
    assert count.count_method(without_roles(ROLES["lora-ppo"], "reward"), SIZES).trunks == 2700


def test_what_learns_and_what_its_pass_trains():
    passes = {name: list(count.learning_passes(table)) for name, table in ROLES.items()}
    assert passes == {
        "ppo": [("actor", None), ("critic", None)],
        "lora-ppo": [("actor", "actor"), ("critic", "critic")],
        "d-lora-ppo": [("sft", "actor"), ("reward_model", "critic")],
        "j-hydra-ppo": [("hydra", "actor")],
        "hydra-ppo": [("hydra", "actor"), ("hydra", "critic")],
        "dpo": [("sft", "actor")],
        "simpo": [("sft", "actor")],
    }
    assert count.learning_passes(STAGE1_TABLES["hydra_sft"]) == {}
    trained = count.trained_parts(ROLES["ppo"], ("critic", None), SIZES)
    assert numbers(trained) == numbers([piece(700), piece(1)])  # its trunk has no LM head
    joined = count.trained_parts(ROLES["j-hydra-ppo"], ("hydra", "actor"), SIZES)
    assert numbers(joined) == numbers([piece(10), piece(1)])


def test_what_memory_json_says():
    written = count.count_all(ROLES["hydra-ppo"], SIZES, dtype="bfloat16")
    assert written["dtype"] == "bfloat16"
    assert list(written["methods"]) == list(ROLES)
    assert written["methods"]["hydra-ppo"]["total"] == 1219
    assert {name: role["bytes_trained"] for name, role in written["roles"].items()} == {
        "actor": 10,
        "critic": 11,
        "reference": 0,
        "reward": 0,
    }
    assert written["roles"]["critic"] == {"trunk": "hydra", "adapter": "critic", "head": "value", "bytes_trained": 11}
    whole = count.count_all(ROLES["ppo"], SIZES, dtype="float32")["roles"]
    assert (whole["actor"]["bytes_trained"], whole["critic"]["bytes_trained"]) == (1000, 701)


# --- single tensors (memory/sizes.py) --------------------------------------------------------------------------------


def test_float32_tensors_with_adamw():
    # Two tensors of 100 and 28 numbers: 4 bytes each; two moments of 4 bytes, and a step count per tensor.
    expected = {"num_bytes": 512, "gradient_bytes": 512, "stepping_bytes": 512, "optimizer_bytes": 128 * 8 + 2 * 4}
    assert asdict(part([100, 28], 4, "adamw")) == expected


def test_half_precision_tensors_have_float32_masters():
    # 2 bytes each and 2 of gradient, which the step turns into 4; 4 of master and 8 of moments.
    expected = {"num_bytes": 200, "gradient_bytes": 200, "stepping_bytes": 400, "optimizer_bytes": 100 * 12 + 4}
    assert asdict(part([100], 2, "adamw")) == expected


def test_eight_bit_moments():
    # 10,000 numbers are 40 blocks of 256 (the last one not full): per moment 10,000 codes and 40 scales of 4 bytes.
    assert state_bytes(10_000, 4, "adamw-8bit") == 2 * (10_000 + 40 * 4) + 4
    assert state_bytes(10_000, 2, "adamw-8bit") == 40_000 + 2 * (10_000 + 40 * 4) + 4
    # Below 4096 numbers moments stay float32.
    assert state_bytes(4095, 4, "adamw-8bit") == 8 * 4095 + 4
    assert state_bytes(4096, 4, "adamw-8bit") == 2 * (4096 + 16 * 4) + 4
