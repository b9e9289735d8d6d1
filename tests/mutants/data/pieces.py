"""Mistakes in cutting a text at its tokens: {function: [(what went wrong, source, source with the mistake)]}."""

MAX = "max(shared_length(begun, text), ends[-1] if ends else 0)"

CHANGES = {
    "text_pieces": [
        ("each prefix lacks its last token", "decode(ids[:count])", "decode(ids[: count - 1])"),
        ("ends may move backwards", MAX, "shared_length(begun, text)"),
        ("tokens are decoded alone", MAX, "(ends[-1] if ends else 0) + len(decode(ids[count - 1 : count]))"),
        ("the rest of the text is lost", "[*ends, len(text)]", "[*ends, ends[-1] if ends else 0]"),
        ("the first piece starts late", "starts = [0, *ends]", "starts = [min(1, len(text)), *ends]"),
    ],
    "shared_length": [
        ("only whole agreement counts", "next(differing, len(text))", "0"),
        ("the first agreement counts", "if ours != theirs", "if ours == theirs"),
        ("a longer beginning is all of it", "next(differing, len(text))", "next(differing, len(begun))"),
        ("beginning and text swapped", "text.startswith(begun)", "begun.startswith(text)"),
        ("all of the text is shared", "return len(begun)", "return len(text)"),
    ],
}
