"""Mistakes in `stages/micro_batches.py`: {function: [(what went wrong, source, source with the mistake)]}."""

ORDER = "key=lambda i: (-sum(sizes[i]), -sizes[i][0], i)"
WIDEST = "prompt, response = max(prompt, sizes[start][0]), max(response, sizes[start][1])"
COST = "found.append((cost + tokens + call_tokens, max(largest, tokens), start))"

CHANGES = {
    "by_token_budget": [
        ("not sorted", "order = sorted(range(len(sizes)), " + ORDER + ")", "order = list(range(len(sizes)))"),
        ("shortest first", ORDER, "key=lambda i: (sum(sizes[i]), sizes[i][0], i)"),
        ("ties by prompt ignored", ORDER, "key=lambda i: (-sum(sizes[i]), i)"),
        (
            "calls are free",
            "sizes[i] for i in order], max_tokens, call_tokens)",
            "sizes[i] for i in order], max_tokens, 0)",
        ),
        ("last group lost", "pairwise([*starts, len(order)])", "pairwise(starts)"),
        ("positions in the sorted order", "[order[start:end] for", "[sorted(order)[start:end] for"),
    ],
    "cheapest_starts": [
        ("budget not reached", "if found and tokens > max_tokens", "if found and tokens >= max_tokens"),
        ("no budget", "if found and tokens > max_tokens", "if False"),
        (
            "a long row is never alone",
            "if found and tokens > max_tokens",
            "if (found or end < len(sizes)) and tokens > 2 * max_tokens",
        ),
        ("prompts padded alone", "tokens = (end - start) * (prompt + response)", "tokens = (end - start) * prompt"),
        ("one row too few counted", "tokens = (end - start) * (prompt", "tokens = (end - start - 1) * (prompt"),
        ("only the longest prompt counts", WIDEST, WIDEST.replace("max(response, sizes[start][1])", "sizes[start][1]")),
        ("width of the last row", WIDEST, "prompt, response = sizes[end - 1]"),
        ("padding costs nothing", COST, COST.replace("cost + tokens", "cost")),
        ("groups before cost nothing", COST, COST.replace("cost + tokens", "tokens")),
        ("unlike groups", COST, COST.replace("max(largest, tokens)", "-max(largest, tokens)")),
        ("a cut at every row", "end = last_start[end - 1]", "end = min(end - 1, last_start[end - 1] + 1)"),
    ],
    "micro_batches": [
        ("order of the rows matters", "else sorted(rows)", "else list(rows)"),
        ("responses do not count", "responses = batch.response_mask.sum", "responses = batch.response_mask[:, :1].sum"),
        (
            "padding of the prompt counts",
            "batch.attention_mask[:, : batch.num_prompt_columns].sum(dim=1)",
            "(batch.attention_mask[:, : batch.num_prompt_columns] >= 0).sum(dim=1)",
        ),
        (
            "prompts cut",
            "first = border - int(mask[:, :border].sum(dim=1).max())",
            "first = border - int(mask[:, :border].sum(dim=1).min())",
        ),
        (
            "responses cut",
            "response_mask.sum(dim=1).max())\n    columns",
            "response_mask.sum(dim=1).min())\n    columns",
        ),
        ("columns of all rows", "columns = slice(first, border + width)", "columns = slice(0, border + width)"),
    ],
}
