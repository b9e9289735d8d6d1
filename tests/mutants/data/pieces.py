"""Mistakes in cutting a text at its tokens: {function: [(what went wrong, source, source with the mistake)]}."""

CHANGES = {
    "text_pieces": [
        ("ends may move backwards", "max(end, ends[-1] if ends else 0)", "end"),
        ("the rest of the text is lost", "[*ends[:-1], len(text)]", "ends"),
        ("the first piece starts late", "starts = [0, *ends[:-1]]", "starts = [min(1, len(text)), *ends[:-1]]"),
        ("blocks overlap", "range(0, len(ids), BLOCK)", "range(0, len(ids), BLOCK - 1)"),
        ("a block ends early", "min(start + BLOCK, len(ids))", "min(start + BLOCK - 1, len(ids))"),
    ],
    "block_ends": [
        ("no shift", "shift = len(all_before) - len(before)", "shift = 0"),
        ("another text is trusted", "is_same and text", "text"),
        ("every block from the start", "if is_same and", "if not is_same and"),
        ("no context", "max(0, start - CONTEXT)", "start"),
        ("each prefix lacks its last token", "decode(ids[first:count])", "decode(ids[first : count - 1])"),
    ],
    "shared_length": [
        ("only whole agreement counts", "next(differing, len(text))", "0"),
        ("the first agreement counts", "if ours != theirs", "if ours == theirs"),
        ("a longer beginning is all of it", "next(differing, len(text))", "next(differing, len(begun))"),
        ("beginning and text swapped", "text.startswith(begun)", "begun.startswith(text)"),
        ("all of the text is shared", "return len(begun)", "return len(text)"),
    ],
}
