"""A decoded text cut at its tokens: pieces that join to exactly that text, whatever the tokenizer does."""

from collections.abc import Callable, Sequence

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are no character, or not yet a whole one."""
BLOCK = 64
"""Tokens that are looked at with a short context, where that gives what decoding from the start gives."""
CONTEXT = 8
"""Tokens before a block that are decoded with it."""

Decode = Callable[[Sequence[int]], str]


def text_pieces(ids: Sequence[int], text: str, decode: Decode) -> list[str]:
    """What each id adds to `text`, which is `decode(ids)`.

    A token is asked for by decoding what is before it with it, since a token alone decodes differently in many
    tokenizers (a space at the front, half a character). A character made of several tokens belongs to the last of
    them, the others get an empty piece; so does a special token that `decode` leaves out.
    """
    ends: list[int] = []
    for start in range(0, len(ids), BLOCK):
        for end in block_ends(ids, start, min(start + BLOCK, len(ids)), text, decode):
            # A decoder that changes its mind about earlier text (clean-up rules) never moves an end backwards.
            ends.append(max(end, ends[-1] if ends else 0))
    starts = [0, *ends[:-1]]
    return [text[start:end] for start, end in zip(starts, [*ends[:-1], len(text)], strict=True)] if ids else []


def block_ends(ids: Sequence[int], start: int, stop: int, text: str, decode: Decode) -> list[int]:
    """Where in `text` each of the ids from `start` to `stop` ends.

    Decoding from the start for every id would take time with the square of their number, so that is done only where a
    short context gives another text for the block than the whole one.
    """
    first = max(0, start - CONTEXT)
    before, after = decode(ids[first:start]), decode(ids[first:stop])
    all_before, all_after = decode(ids[:start]), decode(ids[:stop])
    is_same = after.startswith(before) and after[len(before) :] == all_after[len(all_before) :]
    if is_same and text.startswith(all_after):
        shift = len(all_before) - len(before)
        return [shift + shared_length(decode(ids[first:count]), after) for count in range(start + 1, stop + 1)]
    return [shared_length(decode(ids[:count]), text) for count in range(start + 1, stop + 1)]


def shared_length(begun: str, text: str) -> int:
    """Characters that `begun` and `text` have in common at their start."""
    if text.startswith(begun):  # nearly always, and far quicker than looking at every character
        return len(begun)
    differing = (place for place, (ours, theirs) in enumerate(zip(begun, text, strict=False)) if ours != theirs)
    return next(differing, len(text))
