"""Rules against scores worked out by hand."""

import pytest

from hydra_rlhf.algorithms import rule_rewards


@pytest.mark.parametrize(
    ("length", "target", "maximum", "expected"),
    [
        (10, 10, None, 0.0),
        (4, 10, None, -0.6),
        (25, 10, None, -1.5),
        (20, None, 20, 0.0),
        (3, None, 20, 0.0),
        (25, None, 20, -0.25),
        (30, 20, 24, -0.75),  # |30 - 20| / 20 = 0.5 and (30 - 24) / 24 = 0.25
        (16, 20, 24, -0.2),
    ],
)
def test_length(length, target, maximum, expected):
    assert rule_rewards.length_score(length, target=target, maximum=maximum) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "whole", "expected"),
    [
        ("<think>a\nb</think> 42", True, 1.0),
        ("<think>a</think> forty-two", True, 0.0),
        ("<think>a</think> 42 then", True, 0.0),
        ("so <think>a</think> 42", True, 0.0),
        ("so <think>a</think> 42 then", False, 1.0),
        ("so <think>a\nb</think> 42", False, 1.0),
        ("nothing of the kind", False, 0.0),
    ],
)
def test_format(text, whole, expected):
    assert rule_rewards.format_score(text, r"<think>.*</think> \d+", whole=whole) == expected


@pytest.mark.parametrize(
    ("ids", "ngram", "expected"),
    [
        ([1, 2, 3, 4], 1, 0.0),
        ([7, 7, 7, 7], 1, -0.75),  # four 1-grams, one of them new
        ([1, 2, 1, 2, 1], 2, -0.5),  # 12 21 12 21: two of four are new
        ([1, 2, 1, 2, 3], 3, 0.0),  # 121 212 123
        ([1, 2, 3, 1, 2, 3, 1, 2], 3, -0.5),  # 123 231 312 123 231 312: three of six
        ([1, 1, 2, 1, 1], 2, -0.25),  # 11 12 21 11
        ([5, 5], 2, 0.0),
        ([5, 5], 3, 0.0),
        ([], 1, 0.0),
    ],
)
def test_repetition(ids, ngram, expected):
    assert rule_rewards.repetition_score(ids, ngram=ngram) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "wanted", "unwanted", "expected"),
    [
        ("Thank you, dear Cat!", ("cat", "thank you"), (), 1.0),
        ("concatenate", ("cat",), (), 0.0),
        ("cats", ("cat",), (), 0.0),
        ("bobcat", ("cat",), (), 0.0),
        ("a cat", ("cat", "dog", "hen", "cow"), (), 0.25),
        ("sorry, sorry", (), ("sorry",), -1.0),
        ("sorry", (), ("sorry", "cannot"), -0.5),
        ("Please: cannot do.", ("please",), ("sorry", "cannot"), 0.5),
        ("a+b and axb", ("a.b", "c++"), (), 0.0),  # taken literally
        ("c++, then", ("c++",), (), 1.0),
        ("", ("a",), ("b",), 0.0),
    ],
)
def test_keywords(text, wanted, unwanted, expected):
    assert rule_rewards.keyword_score(text, wanted=wanted, unwanted=unwanted) == pytest.approx(expected, abs=1e-12)
