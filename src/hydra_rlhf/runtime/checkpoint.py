"""Checkpoints that are there whole or not at all: safetensors and JSON, a manifest with SHA-256, one rename.

    step-000100/   *.safetensors   state.json   manifest.json (written last)

A save writes into `tmp-...`, verifies what it reads back, and renames; whatever a killed process leaves behind is a
`tmp-`, `trash-` or `aside-` folder that no reader looks at and that the next save (or `recover`) deals with.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor

from hydra_rlhf.errors import CheckpointError
from hydra_rlhf.runtime.files import clear_write_errors, sync, write_file

SCHEMA = 1
"""Version of the layout; a checkpoint with a higher one is refused."""
STEP_FOLDER = re.compile(r"step-(\d{6,})")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

log = logging.getLogger(__name__)


class NewerSchemaError(CheckpointError):
    """The checkpoint is intact but was written by a later version of this package."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What one save put away."""

    step: int
    """The step it was saved after."""
    tensors: dict[str, dict[str, Tensor]]
    """{file name without ending: {tensor name: tensor on the CPU}}."""
    state: dict[str, Any]
    """Everything else, as JSON has it (tuples come back as lists)."""
    problems: tuple[str, ...] = ()
    """What was wrong with newer checkpoints that were passed over to find this one."""


class CheckpointStore:
    """The checkpoints of one stage. One process at a time may save; reading is always safe."""

    def __init__(self, folder: Path, keep: int, *, failpoint: Callable[[str], None] | None = None) -> None:
        """`keep` newest checkpoints survive a save. `failpoint` is called with the name of each write point, so that
        tests can end a save there."""
        assert keep >= 1, keep
        self.folder = folder
        """Where the step folders are; made by the first save."""
        self._keep = keep
        self._failpoint = failpoint or (lambda _: None)

    def steps(self) -> list[int]:
        """Steps that have a folder, in rising order; whether they are valid shows when they are loaded."""
        if not self.folder.exists():
            return []
        matches = (STEP_FOLDER.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        *,
        protect: Collection[int] = (),
    ) -> None:
        """Save `tensors` ({file name without ending: {name: tensor}}) and the JSON-ready `state` as checkpoint `step`.

        A checkpoint of the same step is replaced. Afterwards the newest `keep` and those of the steps in `protect`
        remain; later steps than this one, which a resume has passed over as damaged, do not.

        Raises:
            CheckpointError: something could not be written or read back; all earlier checkpoints are as they were.
        """
        assert all(FILE_NAME.fullmatch(name) for name in tensors), f"file names: {list(tensors)}"
        draft = self.folder / f"tmp-{step:06d}-{os.getpid()}"
        with clear_write_errors(self.folder):
            self.folder.mkdir(exist_ok=True)  # not its parents: a run folder that was removed is not made again
            self.recover()
            try:
                draft.mkdir()
                self._failpoint("created")
                self._write(draft, step, tensors, state)
                self._failpoint("before_verify")
                self._verify(draft, step, tensors)
            except Exception:
                shutil.rmtree(draft, ignore_errors=True)
                raise
            self._failpoint("before_rename")
            self._commit(draft, step)
            self._prune(step, protect)

    def load(self, step: int) -> Checkpoint:
        """Checkpoint `step`, every byte of it checked.

        Raises:
            CheckpointError: there is no such checkpoint, it is damaged (the message names the file), or it was
                written by a later version.
        """
        folder = self._path(step)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} does not exist; checkpoints here: {self.steps() or 'none'}")
        try:
            files = _check(folder, step)
            tensors = {Path(name).stem: load_file(folder / name) for name in files if name.endswith(".safetensors")}
            return Checkpoint(step, tensors, json.loads((folder / "state.json").read_bytes()))
        except OSError as error:
            raise CheckpointError(
                f"cannot read {folder}: {error.strerror}; check the disk and the permissions"
            ) from error

    def latest_valid(self) -> Checkpoint | None:
        """The newest checkpoint that is valid, or None where none was ever saved.

        Damaged newer ones are passed over, each with a logged warning and an entry in `Checkpoint.problems`.

        Raises:
            CheckpointError: there are checkpoints but none is valid, or one was written by a later version.
        """
        problems: list[str] = []
        for step in reversed(self.steps()):
            try:
                found = self.load(step)
            except NewerSchemaError:
                raise
            except CheckpointError as error:
                log.warning("passing over a damaged checkpoint: %s", error)
                problems.append(str(error))
            else:
                return Checkpoint(found.step, found.tensors, found.state, tuple(problems))
        if problems:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is valid: {'; '.join(problems)}; restore one of them from a copy, or "
                "start the run again in a new folder"
            )
        return None

    def recover(self) -> None:
        """Finish what a killed save left half done; for the one process that may save. Raises OSError."""
        for entry in list(self.folder.iterdir()) if self.folder.exists() else []:
            kind, _, rest = entry.name.partition("-")
            if kind == "aside" and not (self.folder / f"step-{rest}").exists():
                entry.rename(self.folder / f"step-{rest}")  # killed between the two renames of a replacement
            elif kind in ("tmp", "trash", "aside") and entry.is_dir():
                shutil.rmtree(entry)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _write(
        self, folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> None:
        for name, entries in tensors.items():
            path = folder / f"{name}.safetensors"
            save_file({key: tensor.detach().contiguous() for key, tensor in entries.items()}, path)
            sync(path)
            self._failpoint(path.name)
        write_file(folder / "state.json", json.dumps(dict(state), sort_keys=True).encode())
        self._failpoint("before_manifest")
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())
        }
        write_file(folder / "manifest.json", _encode_manifest({"schema": SCHEMA, "step": step, "files": files}))

    def _verify(self, folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Before it is renamed into sight: what is on the disk has the checksums and holds these very tensors."""
        _check(folder, step)
        for name, entries in tensors.items():
            saved = load_file(folder / f"{name}.safetensors")
            for key, tensor in entries.items():
                if not torch.equal(_as_bytes(saved[key]), _as_bytes(tensor)):
                    raise CheckpointError(
                        f"{folder / name}.safetensors reads back other bytes for {key}; check the disk"
                    )

    def _commit(self, draft: Path, step: int) -> None:
        """Make the verified draft visible by one rename (two, with `recover` between them, for a replacement)."""
        final, aside = self._path(step), self.folder / f"aside-{step:06d}"
        if final.exists():
            final.rename(aside)
            self._failpoint("aside")
        draft.rename(final)
        sync(self.folder)
        self._failpoint("renamed")
        if aside.exists():
            shutil.rmtree(aside)

    def _prune(self, step: int, protect: Collection[int]) -> None:
        newest = [other for other in self.steps() if other <= step][-self._keep :]
        for other in self.steps():
            if other not in newest and other not in protect:
                trash = self.folder / f"trash-{other:06d}-{os.getpid()}"
                self._path(other).rename(trash)
                self._failpoint("pruning")
                shutil.rmtree(trash)


def _check(folder: Path, step: int) -> list[str]:
    """Names of the files of an intact checkpoint; CheckpointError naming the file otherwise."""
    files = _read_manifest(folder / "manifest.json", step)
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(
                f"{path} is damaged: it has {path.stat().st_size} bytes instead of {expected['bytes']}"
            )
        if _sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in manifest.json")
    return list(files)


def _as_bytes(tensor: Tensor) -> UInt8[Tensor, " bytes"]:
    """Bytes rather than numbers, because NaN is not equal to itself and -0.0 is equal to 0.0."""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _encode_manifest(content: Mapping[str, Any]) -> bytes:
    """JSON with a digest of itself, so that damage to the manifest is not taken for another layout or step."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "digest": digest}, indent=1, sort_keys=True).encode()


def _read_manifest(path: Path, step: int) -> dict[str, dict[str, Any]]:
    """{file name: {"bytes", "sha256"}} of an intact manifest of this step and a layout we know."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is not complete")
    raw = path.read_bytes()
    try:
        content = json.loads(raw)
        del content["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if _encode_manifest(content) != raw:
        raise CheckpointError(f"{path} is damaged: its digest is not that of its content")
    if content["schema"] > SCHEMA:
        raise NewerSchemaError(
            f"{path} has layout {content['schema']}, this version reads up to {SCHEMA}; use the version of hydra-rlhf "
            "that wrote it, or a later one"
        )
    if content["step"] != step or not all(FILE_NAME.fullmatch(name) for name in content["files"]):
        raise CheckpointError(f"{path} does not belong to step {step}")
    return content["files"]
