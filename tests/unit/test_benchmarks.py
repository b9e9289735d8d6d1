"""The written parts of the benchmarks: what the story rule counts, which openings are held out, what is not shown."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import real_data
import stories
import story_openings
import story_rule


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
