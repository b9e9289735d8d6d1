"""Scores of one response by a rule: its length, its form, its repetitions, its words. Plain Python, no model."""

import re
from collections.abc import Sequence


def length_score(length: int, *, target: int | None, maximum: int | None) -> float:
    """0 at the target (or up to the maximum), and minus the distance as a share of it elsewhere; both are added."""
    score = 0.0
    if target is not None:
        score -= abs(length - target) / target
    if maximum is not None:
        score -= max(0, length - maximum) / maximum
    return score


def format_score(text: str, pattern: str, *, whole: bool) -> float:
    """1 where the pattern matches the whole text (or any part of it, without `whole`), else 0; `.` is any character."""
    found = re.fullmatch(pattern, text, re.DOTALL) if whole else re.search(pattern, text, re.DOTALL)
    return 0.0 if found is None else 1.0


def repetition_score(ids: Sequence[int], *, ngram: int) -> float:
    """Minus the share of n-grams that have occurred before: distinct n-grams / n-grams - 1; 0 with fewer than n ids."""
    grams = [tuple(ids[start : start + ngram]) for start in range(len(ids) - ngram + 1)]
    if not grams:
        return 0.0
    return len(set(grams)) / len(grams) - 1.0


def keyword_score(text: str, *, wanted: Sequence[str], unwanted: Sequence[str]) -> float:
    """Share of the wanted words that occur minus share of the unwanted ones that do, in [-1, 1].

    A word or phrase occurs where it stands by itself, in any case: `cat` is in "A Cat!" and not in "concatenate".
    """
    return _share_found(text, wanted) - _share_found(text, unwanted)


def _share_found(text: str, words: Sequence[str]) -> float:
    if not words:
        return 0.0
    found = sum(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None for word in words)
    return found / len(words)
