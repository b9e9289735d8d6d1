"""A decoded text cut at its tokens: pieces that join to exactly that text, whatever the tokenizer does."""

from collections.abc import Callable, Sequence

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are no character, or not yet a whole one."""


def text_pieces(ids: Sequence[int], text: str, decode: Callable[[Sequence[int]], str]) -> list[str]:
    """What each id adds to `text`, which is `decode(ids)`.

    A token is asked for by decoding everything up to it, since a token alone decodes differently in many tokenizers
    (a space at the front, half a character). A character made of several tokens belongs to the last of them, the
    others get an empty piece; so does a special token that `decode` leaves out.
    """
    ends: list[int] = []
    for count in range(1, len(ids)):
        begun = decode(ids[:count])
        # A decoder that changes its mind about earlier text (clean-up rules) never moves an end backwards.
        ends.append(max(shared_length(begun, text), ends[-1] if ends else 0))
    starts = [0, *ends]
    return [text[start:end] for start, end in zip(starts, [*ends, len(text)], strict=True)] if ids else []


def shared_length(begun: str, text: str) -> int:
    """Characters that `begun` and `text` have in common at their start."""
    if text.startswith(begun):  # nearly always, and far quicker than looking at every character
        return len(begun)
    differing = (place for place, (ours, theirs) in enumerate(zip(begun, text, strict=False)) if ours != theirs)
    return next(differing, len(text))
