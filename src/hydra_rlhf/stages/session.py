"""What the two loops need from outside: somewhere to write, someone who may ask to stop, a measure of memory."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from hydra_rlhf.runtime.checkpoint import Checkpoint
from hydra_rlhf.runtime.interrupt import StopRequest
from hydra_rlhf.runtime.measure import PhaseMemory
from hydra_rlhf.runtime.progress import Progress
from hydra_rlhf.runtime.run import Run


class Session:
    """A loop's view of a run. Without a run folder (the Python functions) nothing is written or restored."""

    def __init__(self, run: Run | None = None, *, memory: PhaseMemory | None = None) -> None:
        self.run = run
        self.stop = run.stop if run is not None else StopRequest()
        """Asked between decode steps and between training steps."""
        self.memory = run.memory if run is not None else memory or PhaseMemory()
        self.history: list[dict[str, Any]] = []
        """Every logged line of this process: {stage, step, metrics...}."""

    def begin(self, stage: str) -> Checkpoint | None:
        """Begin a stage, or take it up again: its newest checkpoint, or None."""
        if self.run is None:
            return None
        self.run.begin_stage(stage)
        return self.run.restore(stage)

    def save(
        self,
        stage: str,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        protect: Collection[int] = (),
    ) -> None:
        """Commit a checkpoint after `step`."""
        if self.run is not None:
            self.run.save_checkpoint(stage, step, tensors, state, protect=protect)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Log one step, with what memory holds now."""
        line = {**metrics, **self.memory.metrics()}
        self.history.append({"stage": stage, "step": step, **line})
        if self.run is not None:
            self.run.log(stage, step, line)

    @property
    def keeps_samples(self) -> bool:
        """Whether responses are written anywhere; without a run folder nobody asks what their tokens look like."""
        return self.run is not None

    def log_sample(self, sample: Mapping[str, Any]) -> None:
        """Keep one response as text."""
        if self.run is not None:
            self.run.log_sample(sample)

    def progress(self, stage: str, num_steps: int, *, done: int) -> Progress:
        """How far the stage is, on stderr."""
        return Progress(stage, num_steps, done=done)


def due(every: int, step: int, num_steps: int) -> bool:
    """True at every `every`-th step (0 = none) and at the last."""
    return step == num_steps or (every > 0 and step % every == 0)
