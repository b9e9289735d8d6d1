"""The run folder: one process writes it, everything in it can be cut back to the last checkpoint and continued.

recipe.yaml, environment.json, metrics.jsonl, samples.jsonl, stages.json (which stages are done, and where in the two
JSONL files each began), checkpoints/<stage>/ and whatever the stages write besides. `.lock` is held while a run lives.
"""

import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from hydra_rlhf.config import Recipe
from hydra_rlhf.errors import CheckpointError
from hydra_rlhf.recipes import recipe_differences
from hydra_rlhf.runtime.checkpoint import Checkpoint, CheckpointStore
from hydra_rlhf.runtime.environment import describe_environment, redact
from hydra_rlhf.runtime.files import acquire_lock, clear_write_errors, read_json, read_yaml, write_file
from hydra_rlhf.runtime.interrupt import StopRequest
from hydra_rlhf.runtime.measure import PhaseMemory
from hydra_rlhf.runtime.metrics import JsonLines, strict_json
from hydra_rlhf.runtime.progress import Progress
from hydra_rlhf.runtime.resume import change_settings

OFFSETS = "jsonl_bytes"
"""Key under which a checkpoint's state holds the sizes of the JSONL files; taken out again by `Run.restore`."""

log = logging.getLogger(__name__)


class Run:
    """A run folder, open for writing (`Run.open`, with the lock) or for reading (`Run.load`, without).

    with Run.open(recipe, resume=False) as run:
        if not run.stage_done("ppo"):
            run.begin_stage("ppo")
            checkpoint = run.restore("ppo")
            run.log("ppo", step, metrics)
            run.save_checkpoint("ppo", step, tensors, state)
            run.finish_stage("ppo")
    """

    def __init__(self, folder: Path, recipe: Recipe, lock: int | None) -> None:
        """Use `Run.open` or `Run.load`. `lock` is the file descriptor that holds the folder's lock."""
        self.folder = folder
        """The run folder."""
        self.recipe = recipe
        """The run's resolved settings."""
        self.metrics = JsonLines(folder / "metrics.jsonl")
        """One object per logged step."""
        self.samples = JsonLines(folder / "samples.jsonl")
        """One object per logged response."""
        self.stop = StopRequest()
        """Whether a signal has asked to stop; listens inside `with Run.open(...)`."""
        self.memory = PhaseMemory(track_tensors=recipe.memory.track_tensors)
        """Bytes needed by each phase of this process."""
        self._lock = lock
        stages = folder / "stages.json"
        self._stages: dict[str, dict[str, Any]] = self.read_json(stages.name) if stages.exists() else {}

    @classmethod
    def open(cls, recipe: Recipe, *, resume: bool) -> "Run":
        """Open `output_dir/name` for writing: a new folder, or with `resume` the one that is there (if any).

        Raises:
            CheckpointError: the folder is in use by another process, cannot be written, holds something else than a
                run, exists already (without `resume`), or was made with other settings (with it).
        """
        folder = Path(recipe.output_dir) / recipe.name
        with clear_write_errors(folder):
            if folder.is_dir() and not is_run_folder(folder) and _visible_entries(folder):
                raise CheckpointError(
                    f"{folder} is not empty and not a run folder (no recipe.yaml); choose another name or output_dir"
                )
            folder.mkdir(parents=True, exist_ok=True)
            lock = acquire_lock(folder)
            try:
                _prepare(folder, recipe, resume)
                return cls(folder, recipe, lock)
            except BaseException:
                os.close(lock)
                raise

    @classmethod
    def load(cls, folder: Path | str) -> "Run":
        """Open an existing run folder for reading its results; only `write_json` may be used to add to it.

        Raises:
            CheckpointError: `folder` is not a run folder, or its settings cannot be read.
        """
        return cls(Path(folder), read_recipe(Path(folder)), None)

    def __enter__(self) -> "Run":
        if self._lock is not None:
            self.stop.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self.stop.__exit__(kind, error, traceback)
            os.close(self._lock)
            self._lock = None

    def stage_done(self, stage: str) -> bool:
        """True once `finish_stage` was called for it, in this process or an earlier one."""
        return bool(self._stages.get(stage, {}).get("done", False))

    def begin_stage(self, stage: str) -> None:
        """Note where the stage's lines begin; for a stage that an earlier process began, this stays as it is."""
        assert not self.stage_done(stage), f"stage {stage} is done"
        if stage not in self._stages:
            self._write_stages({**self._stages, stage: {"done": False, **self._offsets()}})

    def finish_stage(self, stage: str) -> None:
        """Mark a begun stage as done; its results must be in the folder by now."""
        self._offsets()  # its lines must be on the disk before it counts as done
        self._write_stages({**self._stages, stage: {**self._stages[stage], "done": True}})

    def checkpoints(self, stage: str) -> CheckpointStore:
        """The stage's checkpoints, under checkpoints/<stage>/."""
        return CheckpointStore(self.folder / "checkpoints" / stage, self.recipe.runtime.keep_checkpoints)

    def save_checkpoint(
        self,
        stage: str,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        protect: Collection[int] = (),
    ) -> None:
        """Save after `step`, with the sizes of the JSONL files; see `CheckpointStore.save`."""
        assert self._lock is not None, "opened for reading"
        assert OFFSETS not in state, OFFSETS
        self.checkpoints(stage).save(step, tensors, {**state, OFFSETS: self._offsets()}, protect=protect)

    def restore(self, stage: str) -> Checkpoint | None:
        """The newest valid checkpoint of a begun stage (None if it has none), with both JSONL files cut back to it.

        Without a checkpoint they are cut back to where the stage began. Call it once, before the stage logs anything.

        Raises:
            CheckpointError: there are checkpoints but none is valid, or lines before the checkpoint are missing.
        """
        assert self._lock is not None, "opened for reading"
        assert stage in self._stages, f"begin_stage({stage!r}) comes first"
        store = self.checkpoints(stage)
        with clear_write_errors(store.folder):
            store.recover()
        found = store.latest_valid()
        offsets = self._stages[stage] if found is None else found.state[OFFSETS]
        self.metrics.truncate(offsets["metrics_bytes"])
        self.samples.truncate(offsets["samples_bytes"])
        if found is None:
            return None
        return replace(found, state={key: value for key, value in found.state.items() if key != OFFSETS})

    def progress(self, stage: str, num_steps: int, *, done: int = 0) -> Progress:
        """The stage's progress display, to be entered; `done` steps were done by earlier processes."""
        return Progress(stage, num_steps, done=done)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl."""
        assert self._lock is not None, "opened for reading"
        self.metrics.append({"stage": stage, "step": step, **metrics})

    def log_sample(self, sample: Mapping[str, Any]) -> None:
        """Append one line to samples.jsonl."""
        assert self._lock is not None, "opened for reading"
        self.samples.append(sample)

    def write_json(self, name: str, content: Any) -> None:
        """Write or replace the file `name` of the folder in one step; non-finite floats become strings."""
        assert Path(name).name == name, name
        text = json.dumps(redact(strict_json(content)), indent=2, allow_nan=False) + "\n"
        with clear_write_errors(self.folder / name):
            write_file(self.folder / name, text.encode())

    def read_json(self, name: str) -> Any:
        """Content of the folder's file `name`. Raises CheckpointError where it is missing or no JSON."""
        return read_json(self.folder / name)

    def _offsets(self) -> dict[str, int]:
        return {"metrics_bytes": self.metrics.sync(), "samples_bytes": self.samples.sync()}

    def _write_stages(self, stages: dict[str, dict[str, Any]]) -> None:
        assert self._lock is not None, "opened for reading"
        self.write_json("stages.json", stages)
        self._stages = stages


def is_run_folder(folder: Path) -> bool:
    """True where a run has begun: recipe.yaml is the first file it writes."""
    return (folder / "recipe.yaml").is_file()


def delete_run(folder: Path) -> None:
    """Delete a run folder that no process holds. Raises CheckpointError where one does."""
    lock = acquire_lock(folder)
    try:
        shutil.rmtree(folder)
    finally:
        os.close(lock)


def read_recipe(folder: Path) -> Recipe:
    """The settings a run was made with. Raises CheckpointError where they are missing or not known to this version."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a run folder: {path} does not exist")
    try:
        return TypeAdapter(Recipe).validate_python(read_yaml(path))
    except ValidationError as error:
        raise CheckpointError(
            f"{path} has settings that this version does not know: {error}; use the version named in environment.json"
        ) from error


def _visible_entries(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]


def _prepare(folder: Path, recipe: Recipe, resume: bool) -> None:
    """Under the lock: check an existing run against `recipe`, or write the first files of a new one."""
    settings = yaml.safe_dump(redact(asdict(recipe)), sort_keys=False)
    if is_run_folder(folder) and _has_work(folder):
        if not resume:
            raise CheckpointError(
                f"{folder} holds a run already; continue it with --resume, choose another name, or delete the folder"
            )
        steps = CheckpointStore(folder / "checkpoints" / "ppo", recipe.runtime.keep_checkpoints).steps()
        change_settings(folder, settings, ppo_steps=max(steps, default=0))
    else:
        # A run that stopped before its first step, at a wrong model path say, has nothing to lose and begins anew.
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)
        for name in ("machine.json", "stages.json", "environment.json"):
            (folder / name).unlink(missing_ok=True)
        if resume:
            log.warning("%s holds no run yet; starting a new one", folder)
        write_file(folder / "recipe.yaml", settings.encode())
    (folder / "checkpoints").mkdir(exist_ok=True)
    _record_environment(folder / "environment.json")


def _has_work(folder: Path) -> bool:
    """True once a run has logged a step, saved a checkpoint or finished a stage."""
    stages = folder / "stages.json"
    done = stages.exists() and any(stage["done"] for stage in read_json(stages).values())
    return done or JsonLines(folder / "metrics.jsonl").size > 0 or any((folder / "checkpoints").glob("*/step-*"))


def _record_environment(path: Path) -> None:
    """Write environment.json once; a resumed run warns of what has changed since instead."""
    environment = redact(describe_environment())
    if not path.exists():
        write_file(path, (json.dumps(environment, indent=2) + "\n").encode())
        return
    changed = recipe_differences(read_json(path)["versions"], environment["versions"])
    if changed:
        log.warning("resumed with other versions, so results may not repeat bit for bit: %s", "; ".join(changed))
