"""How the bytes of a pass rise and fall, and what that comes to with more rows and more layers. Imports no torch.

Rows share nothing and layers are alike, so at every moment of a pass its bytes are a straight line in both. The peak is
the highest of these lines, which is not a line itself: with few rows it may lie elsewhere than with many.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Course:
    """One pass of a few layers, in bytes on top of what was there before."""

    kept: int = 0
    """Live when the layers are done: what backward needs, or the hidden states alone; in a rollout cache and `made`."""
    made: int = 0
    """Of it, what a rollout makes of the adapters; the same for any number of rows."""
    per_layer: float = 0.0
    """What one more layer adds to that."""
    moments: list[int] = field(default_factory=list)
    """Bytes after each operation that made something."""
    deep: range = range(0)
    """The moments from coming to the last layers until backward leaves them: more layers lift them, and no others."""


@dataclass(frozen=True, slots=True)
class Line:
    """Bytes that are linear in the number of rows."""

    one_row: float
    per_row: float
    """What each further row adds."""

    def at(self, num_rows: int) -> float:
        """Bytes with this many rows."""
        return self.one_row + (num_rows - 1) * self.per_row


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a pass needs with any number of rows and layers."""

    depth: int
    """Layers that were run."""
    made: int
    """Bytes that a rollout of so many layers makes of the adapters."""
    kept_lines: Line
    per_layer: Line
    deep: tuple[Line, ...]
    shallow: tuple[Line, ...]

    @classmethod
    def of(cls, one: Course, two: Course, depth: int) -> "Need":
        """From the courses with one row and with two."""
        same = len(one.moments) == len(two.moments) and one.deep == two.deep
        deep: list[Line] = []
        shallow: list[Line] = []
        for i, (a, b) in enumerate(zip(one.moments, two.moments, strict=False)):
            (deep if i in one.deep else shallow).append(Line(a, b - a))
        if not same:  # a single row took another way; what is known is how high both were
            highest = Line(max(one.moments), max(two.moments) - max(one.moments))
            deep, shallow = [highest], [highest]
        return cls(
            depth=depth,
            made=one.made,
            kept_lines=Line(one.kept, two.kept - one.kept),
            per_layer=Line(one.per_layer, two.per_layer - one.per_layer),
            deep=highest_lines(deep),
            shallow=highest_lines(shallow),
        )

    def kept(self, num_rows: int, num_layers: int) -> float:
        """Live when the layers are done."""
        return self.kept_lines.at(num_rows) + self._more_layers(num_rows, num_layers)

    def cache(self, num_rows: int, num_layers: int) -> float:
        """The KV cache of a rollout."""
        return self.kept(num_rows, num_layers) - self.made / self.depth * num_layers

    def deep_peak(self, num_rows: int, num_layers: int) -> float:
        """Most bytes while the pass is in the last layers."""
        most = max((line.at(num_rows) for line in self.deep), default=0.0)
        return most + self._more_layers(num_rows, num_layers)

    def peak(self, num_rows: int, num_layers: int) -> float:
        """Most bytes at any moment."""
        shallow = max((line.at(num_rows) for line in self.shallow), default=0.0)
        return max(shallow, self.deep_peak(num_rows, num_layers))

    def _more_layers(self, num_rows: int, num_layers: int) -> float:
        return (num_layers - self.depth) * self.per_layer.at(num_rows)


def highest_lines(lines: Iterable[Line]) -> tuple[Line, ...]:
    """Those that are the highest with some number of rows, and perhaps a few more."""
    found: list[Line] = []
    for line in sorted(set(lines), key=lambda line: (line.one_row, line.per_row), reverse=True):
        if not found or line.per_row > found[-1].per_row:
            found.append(line)
    return tuple(found)
