"""Mistakes in `stages/scoring/outcomes.py`: {function: [(what went wrong, source, source with the mistake)]}."""

CHANGES = {
    "check_returned": [
        ("strings are lists", "if isinstance(returned, str | bytes | dict) or", "if isinstance(returned, dict) or"),
        ("mappings are lists", "isinstance(returned, str | bytes | dict)", "isinstance(returned, str | bytes)"),
        ("generators refused", 'not hasattr(returned, "__iter__")', "not isinstance(returned, Sequence)"),
        ("the first length for all", "check_value(value, length) for", "check_value(value, lengths[0]) for"),
        ("one failure for all", "return [Failure(reason)] * num_responses", "return [Failure(reason)]"),
    ],
    "check_value": [
        ("length not looked at", "if len(value) != length:", "if False:"),
        ("longer is fine", "if len(value) != length:", "if len(value) < length:"),
        (
            "bytes are per-token rewards",
            "isinstance(value, str | bytes):\n        return check_number",
            "isinstance(value, str):\n        return check_number",
        ),
        ("sum not looked at", "return total if isinstance(total, Failure) else rewards", "return rewards"),
        ("one number for all tokens", "return total if isinstance(total, Failure) else rewards", "return total"),
        (
            "a bad token left out",
            "        if isinstance(number, Failure):\n            return number\n",
            "        if isinstance(number, Failure):\n            continue\n",
        ),
    ],
    "check_number": [
        ("strings are numbers", "if isinstance(value, str | bytes) or not", "if not"),
        ("NaN passes", "not abs(number) <= LARGEST_SCORE", "abs(number) > LARGEST_SCORE"),
        ("negative infinity passes", "not abs(number) <= LARGEST_SCORE", "not number <= LARGEST_SCORE"),
        ("what float32 holds is enough", "LARGEST_SCORE = 1e15", "LARGEST_SCORE = 3.4e38"),
        ("the largest is refused", "not abs(number) <= LARGEST_SCORE", "not abs(number) < LARGEST_SCORE"),
        ("huge integers are 0", "        number = math.inf", "        number = 0.0"),
    ],
    "score_in_parts": [
        ("all at once", "size = batch_rows or num_responses", "size = num_responses"),
        ("one by one", "size = batch_rows or num_responses", "size = 1"),
        ("asks on", "if len(list(failures(outcomes))) > max_failed:", "if False:"),
        (
            "stops one too early",
            "if len(list(failures(outcomes))) > max_failed:",
            "if len(list(failures(outcomes))) >= max_failed > 0:",
        ),
        (
            "the rest is missing",
            'return outcomes + all_failed("was not asked any more", num_responses - len(outcomes))',
            "return outcomes",
        ),
        (
            "as many as all failed",
            "num_responses - len(outcomes))\n        outcomes",
            "num_responses)\n        outcomes",
        ),
        ("columns of the first rows", "column[start:stop]", "column[: stop - start]"),
    ],
}
