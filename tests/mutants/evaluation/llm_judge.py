"""Mistakes in `evaluation/llm_judge.py`: {function: [(what went wrong, source, source with the mistake)]}."""

AGREED = "ours if ours == 1 - value_of(swapped) else 0.5"

CHANGES = {
    "read_verdict": [
        ("first line", "lines[-1].lower()", "lines[0].lower()"),
        ("anywhere in the line", 're.fullmatch(r"verdict', 're.search(r"verdict'),
        ("ties unread", "(a|b|tie)\\b", "(a|b)\\b"),
        ("A is B", '"A" if found[1] == "a" else "B"', '"B" if found[1] == "a" else "A"'),
        ("case matters", "lines[-1].lower()", "lines[-1]"),
        (
            "empty lines count",
            "for line in text.strip().splitlines() if line.strip",
            "for line in text.splitlines() if True or line.strip",
        ),
    ],
    "outcome_of": [
        ("first order only", AGREED, "ours"),
        ("second order only", AGREED, "1 - value_of(swapped)"),
        ("mean of both", AGREED, "(ours + 1 - value_of(swapped)) / 2"),
        ("places not swapped back", AGREED, "ours if ours == value_of(swapped) else 0.5"),
        ("failure is a tie", "        return math.nan\n    ours", "        return 0.5\n    ours"),
        (
            "one missing verdict is enough",
            "if straight is None or swapped is None:\n        return math.nan",
            "if straight is None:\n        return math.nan\n    if swapped is None:\n        return value_of(straight)",
        ),
        ("A loses", '{"A": 1.0, "tie": 0.5, "B": 0.0}', '{"A": 0.0, "tie": 0.5, "B": 1.0}'),
    ],
}
