"""Mistakes in `algorithms/rule_rewards.py`: {function: [(what went wrong, source, source with the mistake)]}."""

LENGTH_TARGET = "score -= abs(length - target) / target"
LENGTH_MAXIMUM = "score -= max(0, length - maximum) / maximum"
GRAMS = "for start in range(len(ids) - ngram + 1)"
DISTINCT = "return len(set(grams)) / len(grams) - 1.0"
SHARES = "return _share_found(text, wanted) - _share_found(text, unwanted)"
WORD = r'rf"(?<!\w){re.escape(word)}(?!\w)"'

CHANGES = {
    "length_score": [
        ("sign of the target", LENGTH_TARGET, LENGTH_TARGET.replace("-=", "+=")),
        ("not a share of the target", LENGTH_TARGET, "score -= abs(length - target)"),
        ("shorter is better than the target", LENGTH_TARGET, "score -= (length - target) / target"),
        ("shorter than the maximum is better", LENGTH_MAXIMUM, "score -= (length - maximum) / maximum"),
        ("not a share of the maximum", LENGTH_MAXIMUM, "score -= max(0, length - maximum)"),
        ("sign of the maximum", LENGTH_MAXIMUM, LENGTH_MAXIMUM.replace("-=", "+=")),
        ("the maximum alone counts", LENGTH_MAXIMUM, LENGTH_MAXIMUM.replace("-= ", "= -")),
        (
            "one too many is allowed",
            LENGTH_MAXIMUM,
            LENGTH_MAXIMUM.replace("length - maximum)", "length - maximum - 1)"),
        ),
    ],
    "format_score": [
        ("turned round", "return 0.0 if found is None else 1.0", "return 1.0 if found is None else 0.0"),
        (
            "any part will do",
            "re.fullmatch(pattern, text, re.DOTALL) if whole",
            "re.search(pattern, text, re.DOTALL) if whole",
        ),
        ("the beginning will do", "re.fullmatch(pattern", "re.match(pattern"),
        ("always the whole", "else re.search(pattern, text, re.DOTALL)", "else re.fullmatch(pattern, text, re.DOTALL)"),
        ("the beginning where any part will do", "else re.search(", "else re.match("),
        ("one line, whole", "re.fullmatch(pattern, text, re.DOTALL)", "re.fullmatch(pattern, text)"),
        ("one line, part", "re.search(pattern, text, re.DOTALL)", "re.search(pattern, text)"),
    ],
    "repetition_score": [
        ("sign", DISTINCT, "return 1.0 - len(set(grams)) / len(grams)"),
        ("repeats rewarded", DISTINCT, "return -len(set(grams)) / len(grams)"),
        ("single ids", "tuple(ids[start : start + ngram])", "ids[start]"),
        ("one id too many", "ids[start : start + ngram]", "ids[start : start + ngram + 1]"),
        ("last n-gram left out", GRAMS, "for start in range(len(ids) - ngram)"),
        ("ends counted as n-grams", GRAMS, "for start in range(len(ids))"),
        ("divided by ids", DISTINCT, DISTINCT.replace("/ len(grams)", "/ len(ids)")),
        ("side by side only", GRAMS, "for start in range(0, len(ids) - ngram + 1, ngram)"),
    ],
    "keyword_score": [
        ("sign", SHARES, SHARES.replace(" - ", " + ")),
        ("turned round", SHARES, "return _share_found(text, unwanted) - _share_found(text, wanted)"),
        ("unwanted words ignored", SHARES, "return _share_found(text, wanted)"),
        ("parts of words", WORD, "re.escape(word)"),
        ("beginnings of words", WORD, WORD.replace(r"(?!\w)", "")),
        ("ends of words", WORD, WORD.replace(r"(?<!\w)", "")),
        ("word borders of regular expressions", WORD, r'rf"\b{re.escape(word)}\b"'),
        ("words as patterns", "{re.escape(word)}", "{word.replace('++', '')}"),
        ("case matters", ", re.IGNORECASE)", ")"),
        ("count, not share", "return found / len(words)", "return float(found)"),
    ],
}
