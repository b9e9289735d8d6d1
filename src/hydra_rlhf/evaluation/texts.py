"""What can be said of texts without a judge: variety (distinct-n), and overlap with reference responses (ROUGE)."""

import re
from collections.abc import Sequence
from typing import Any

from hydra_rlhf.errors import ConfigError
from hydra_rlhf.evaluation.statistics import bootstrap_interval

ROUGE_KINDS = ("rouge1", "rouge2", "rougeL")


def words(text: str) -> list[str]:
    """Words and single punctuation marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Different n-grams of words / all n-grams, over all texts together (Li et al. 2016); None without any n-gram.

    The share falls as there is more text, so it compares only answers to equally many prompts.
    """
    grams = [tuple(found[i : i + n]) for found in map(words, texts) for i in range(len(found) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def rouge(texts: Sequence[str], references: Sequence[str], *, seed: int) -> dict[str, Any]:
    """Mean F1 of ROUGE-1, -2 and -L (Lin 2004; stemmed English words), each with its 95 % interval over texts.

    Raises `ConfigError` where the `eval` extra is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError(
            f"--rouge needs rouge-score: pip install 'hydra-rlhf[eval]' (importing it says: {error})"
        ) from error
    scorer = RougeScorer(ROUGE_KINDS, use_stemmer=True)
    scores = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    numbers: dict[str, Any] = {}
    for kind in ROUGE_KINDS:
        values = [score[kind].fmeasure for score in scores]
        numbers[kind] = sum(values) / len(values)
        numbers[f"{kind}_ci"] = list(bootstrap_interval(values, seed=seed))
    return numbers
