"""Rules as sources: what part of a response each one looks at."""

from hydra_rlhf.algorithms.rule_rewards import format_score, keyword_score, length_score, repetition_score
from hydra_rlhf.config_rewards import KeywordsSource, LengthSource, RegexSource, RepetitionSource
from hydra_rlhf.stages.scoring.outcomes import Outcome, ScoreRequest


def score_length(config: LengthSource, request: ScoreRequest) -> list[Outcome]:
    """Scores by length, in the source's unit."""
    lengths = {
        "tokens": request.lengths,
        "words": [len(text.split()) for text in request.responses],
        "characters": [len(text) for text in request.responses],
    }[config.unit]
    return [length_score(length, target=config.target, maximum=config.maximum) for length in lengths]


def score_regex(config: RegexSource, request: ScoreRequest) -> list[Outcome]:
    """1 or 0 by the form of the text."""
    return [format_score(text, config.pattern, whole=config.whole) for text in request.responses]


def score_repetition(config: RepetitionSource, request: ScoreRequest) -> list[Outcome]:
    """Minus the share of repeated token n-grams."""
    return [repetition_score(ids, ngram=config.ngram) for ids in request.response_ids]


def score_keywords(config: KeywordsSource, request: ScoreRequest) -> list[Outcome]:
    """Wanted words minus unwanted ones."""
    return [keyword_score(text, wanted=config.wanted, unwanted=config.unwanted) for text in request.responses]
