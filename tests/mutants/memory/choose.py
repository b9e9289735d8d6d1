"""Mistakes in `memory/choose.py`: {function: [(what went wrong, source, source with the mistake)]}."""

BISECTION = (
    "        if option(middle).peak <= budget:\n            high = middle\n        else:\n            low = middle"
)
TIME = "(1.0 + checkpointed_share / FORWARD_BACKWARD) * (1.0 + CALL_TOKENS / tokens)"
CHEAPEST = "min(fitting, key=lambda option: option.relative_time, default=None)"
FIRST_ROWS = "if rollout_bytes(work.plan, rows, layers) <= budget), given.rollout_rows or 1)"

CHANGES = {
    "choose": [
        ("smallest peak, not cheapest", CHEAPEST, CHEAPEST.replace("relative_time", "peak")),
        ("slowest", CHEAPEST, CHEAPEST.replace("min(", "max(")),
        ("first that fits", CHEAPEST, "next(iter(fitting), None)"),
        ("budget not used up", "if option.peak <= budget]", "if option.peak < budget]"),
        ("what does not fit is chosen", "if option.peak <= budget]", "if option.peak]"),
        ("rows that just fit refused", FIRST_ROWS, FIRST_ROWS.replace("<= budget", "< budget")),
        (
            "rows not looked at",
            FIRST_ROWS,
            FIRST_ROWS.replace("rollout_bytes(work.plan, rows, layers) <= budget", "rows"),
        ),
        ("given rows forgotten where they do not fit", FIRST_ROWS, FIRST_ROWS.replace("given.rollout_rows or 1", "1")),
        ("rollout left out", 'sum(phases["rollout"].values()) if "rollout" in phases else 0', "0"),
    ],
    "what is held": [
        ("rows looked at all the same", "if work.held <= budget else ()", "if True else ()"),
        ("rows never looked at", "if work.held <= budget else ()", "if False else ()"),
        ("layers looked at all the same", "    if work.held > budget:\n        return option(high)\n", ""),
        ("smallest parts planned", "    if work.held > budget:\n        return False\n", ""),
        ("none recomputed", "return option(high)\n    if option(low)", "return option(low)\n    if option(low)"),
    ],
    "most_graphs": [
        (
            "all that there are",
            "        if peak(phases) <= budget:\n            return replace",
            "        if True:\n            return replace",
        ),
        ("just enough is not enough", "        if peak(phases) <= budget:\n", "        if peak(phases) < budget:\n"),
        ("a rest is no micro-batch", "range(ceil(work.num_sequences / max(", "range(int(work.num_sequences / max("),
        (
            "a single sequence forgotten",
            "max(1, option.cuts.micro_batch_tokens // work.tokens_each)",
            "max(9, option.cuts.micro_batch_tokens // work.tokens_each)",
        ),
        (
            "phases without graphs",
            "return replace(option, cuts=cuts, phases=phases)",
            "return replace(option, cuts=cuts)",
        ),
        ("graphs where none wait", "if found is not None and work.keeps_graphs:", "if found is not None:"),
        ("not among the options", "        options[place] = found\n", "        del place\n"),
    ],
    "fewest_layers": [
        ("all layers", BISECTION, BISECTION.replace("high = middle", "low = middle")),
        ("one layer too few", "low = middle\n    return option(high)", "low = middle\n    return option(low)"),
        ("none is not tried", "    if option(low).peak <= budget:\n", "    if option(low).peak < 0:\n"),
        ("given layers ignored", "if given.checkpointed_layers is not None:", "if False:"),
        ("zero given layers ignored", "if given.checkpointed_layers is not None:", "if given.checkpointed_layers:"),
        ("just enough is not enough", BISECTION, BISECTION.replace("<= budget", "< budget")),
    ],
    "fits_smallest": [
        ("largest parts", "or work.tokens_each,", "or work.tokens_each * work.num_sequences,"),
        ("given micro-batch ignored", "work.given.micro_batch_tokens or work.tokens_each", "work.tokens_each"),
        ("given rows ignored", "work.given.rollout_rows or 1,", "1,"),
        ("nothing recomputed", "layers = work.num_layers if", "layers = 0 if"),
        ("given layers ignored", "if work.given.checkpointed_layers is None else", "if True else"),
        ("just enough is not enough", "peak(work.plan(cuts)) <= budget", "peak(work.plan(cuts)) < budget"),
    ],
    "relative_time": [
        ("recomputing costs nothing", TIME, "1.0 + CALL_TOKENS / tokens"),
        ("recomputing costs a backward", TIME, TIME.replace(" / FORWARD_BACKWARD", "")),
        ("calls cost nothing", TIME, "1.0 + checkpointed_share / FORWARD_BACKWARD"),
        ("calls cost what they have tokens", TIME, TIME.replace("CALL_TOKENS / tokens", "tokens / CALL_TOKENS")),
        ("layers, not their share", "layers / num_layers)", "layers / 1.0)"),
    ],
    "micro_batch_sizes and row_groups": [
        ("no limit", "max(min(MAX_MICRO_BATCH_TOKENS, num_tokens), tokens_each)", "max(num_tokens, tokens_each)"),
        ("more than there are", "min(MAX_MICRO_BATCH_TOKENS, num_tokens)", "MAX_MICRO_BATCH_TOKENS"),
        ("less than a sequence", "    while size > tokens_each:", "    while size > tokens_each // 2:"),
        ("a single sequence left out", "        size //= 2\n    yield tokens_each\n", "        size //= 2\n"),
        ("quarters", "        size //= 2", "        size //= 4"),
        ("groups rounded down", "ceil(num_sequences / num_groups)", "num_sequences // num_groups"),
        ("a single row left out", "        num_groups *= 2\n    yield 1\n", "        num_groups *= 2\n"),
        ("given micro-batch ignored", "        yield given\n        return\n    size", "        yield given\n    size"),
    ],
}
