"""Texts that end a response, found in tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopStrings:
    """Looks for the strings in the text of the newest tokens; a string may begin or end inside a token."""

    strings: tuple[str, ...]
    decode: Callable[[Sequence[int]], str]
    """Ids -> text."""

    def first_end(self, ids: Sequence[int], num_known: int, *, least: int = 1) -> int | None:
        """How many of `ids`, and `least` at the least, it takes until their text has one of the strings, or None.

        The text of the first `num_known` ids has none, but for what the first `least` have. Nearly every token has a
        byte at least, so twice a string's bytes are tokens enough to find it in.
        """
        reach = 2 * max(len(string.encode()) for string in self.strings)
        for num in range(max(num_known + 1, least), len(ids) + 1):
            text = self.decode(ids[0 if num == least else max(0, num - reach) : num])
            if any(string in text for string in self.strings):
                return num
        return None

    def cut(self, text: str) -> str:
        """The text before the first of the strings."""
        return text[: min((at for at in map(text.find, self.strings) if at >= 0), default=len(text))]
