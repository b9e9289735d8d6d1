"""Append-only JSON lines that can be cut back on resume, and the sum of metrics over micro-batches."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hydra_rlhf.errors import CheckpointError
from hydra_rlhf.runtime.files import clear_write_errors


def strict_json(value: Any) -> Any:
    """`value` with floats that JSON does not have as the strings "nan", "inf" and "-inf", at any depth.

    Strings rather than null, because a metrics file must never hide that a number was not finite.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: strict_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(entry) for entry in value]
    return value


class JsonLines:
    """A file of one JSON object a line. Nothing is buffered here: after `append` the line is the system's.

    The file is opened anew for every line, so a run folder that was removed is noticed at once and never recreated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        """Where the lines are; the file appears with the first one."""

    @property
    def size(self) -> int:
        """Bytes in the file so far (0 without a file): the offset `truncate` takes."""
        return self.path.stat().st_size if self.path.exists() else 0

    def append(self, record: Mapping[str, Any]) -> None:
        """Write `record` as one line: `stage` and `step` first, then the other keys sorted; ASCII, whatever the locale.

        Raises:
            CheckpointError: the file cannot be written (folder removed or read-only, disk full). A line that did
                not fit is taken back, so the file always ends in a whole line.
        """
        first = {key: record[key] for key in ("stage", "step") if key in record}
        ordered = first | {key: record[key] for key in sorted(record) if key not in first}
        line = (json.dumps(strict_json(ordered), allow_nan=False) + "\n").encode()
        with clear_write_errors(self.path), self.path.open("ab", buffering=0) as file:
            start = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError("no space left for the whole line")
            except OSError:
                file.truncate(start)
                raise

    def sync(self) -> int:
        """Force the lines to the disk, so that no saved offset can outlive the lines before it; returns `size`."""
        if self.path.exists():
            with clear_write_errors(self.path), self.path.open("ab") as file:
                os.fsync(file.fileno())
        return self.size

    def truncate(self, offset: int) -> None:
        """Cut the file back to `offset` bytes (a `size` read earlier): the lines of work that will be done again.

        Raises:
            CheckpointError: the file is shorter than that, so lines are missing that cannot be written again.
        """
        size = self.size
        if size < offset:
            raise CheckpointError(
                f"{self.path} has {size} bytes, but the checkpoint was saved when it had {offset}: lines are missing; "
                "restore the file, or start the run again in a new folder"
            )
        if size > offset:
            with clear_write_errors(self.path):
                os.truncate(self.path, offset)


class Accumulator:
    """Merges the metrics of micro-batches (or minibatches) into one number per key.

    Keys ending in `_max` or `_min` keep the largest or smallest entry; all others add up, so a mean is made of parts
    that are already divided by the count of the whole. NaN stays NaN in all three.
    """

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Merge scalars (tensors of one entry, or numbers) in; nothing waits for the device here."""
        for key, value in metrics.items():
            # Sums in double precision: the number of micro-batches is a memory knob and must not show in a metric.
            # A copy, because the caller may go on writing into its tensor.
            entry = torch.as_tensor(value).detach().to(torch.float64, copy=True).reshape(())
            if key not in self._totals:
                self._totals[key] = entry
            elif key.endswith("_max"):
                self._totals[key] = torch.maximum(self._totals[key], entry)
            elif key.endswith("_min"):
                self._totals[key] = torch.minimum(self._totals[key], entry)
            else:
                self._totals[key] = self._totals[key] + entry

    def result(self) -> dict[str, float]:
        """The merged numbers, sorted by key; the one place where the device is waited for."""
        return {key: self._totals[key].item() for key in sorted(self._totals)}
