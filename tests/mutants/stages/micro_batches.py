"""Mistakes in `stages/micro_batches.py`: {function: [(what went wrong, source, source with the mistake)]}."""

ORDER = "key=lambda i: (-sum(sizes[i]), -sizes[i][0], i)"
FILL = "(i - starts[-1] + 1) * (prompt + response) > max_tokens"
WIDEST = "prompt, response = max(prompt, own_prompt), max(response, own_response)"

CHANGES = {
    "by_token_budget": [
        ("not sorted", "order = sorted(range(len(sizes)), " + ORDER + ")", "order = list(range(len(sizes)))"),
        ("shortest first", ORDER, "key=lambda i: (sum(sizes[i]), sizes[i][0], i)"),
        ("ties by prompt ignored", ORDER, "key=lambda i: (-sum(sizes[i]), i)"),
        (
            "not balanced",
            "starts = [*filled_up(ordered, budget), len(order)]",
            "starts = [*filled_up(ordered, max_tokens), len(order)]",
        ),
        ("one group more", "<= num_groups)", "<= num_groups + 1)"),
        ("a budget too low", "starts = [*filled_up(ordered, budget)", "starts = [*filled_up(ordered, budget - 1)"),
        ("last group lost", "budget), len(order)]", "budget)]"),
        ("positions in the sorted order", "[order[start:end] for", "[sorted(order)[start:end] for"),
    ],
    "filled_up": [
        ("budget not reached", FILL, FILL.replace(" > ", " >= ")),
        ("one row too many", FILL, FILL.replace(" + 1", "")),
        ("prompts padded alone", FILL, FILL.replace("(prompt + response)", "prompt")),
        ("only the longest row counts", WIDEST, WIDEST.replace("max(prompt, own_prompt)", "max(prompt, 0)")),
        ("width of the new row", WIDEST, "prompt, response = own_prompt, own_response"),
        ("width of the group before", "            prompt, response = own_prompt, own_response\n", ""),
        ("a long row is never alone", "not starts or (i", "not starts or i and (i - 1"),
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
