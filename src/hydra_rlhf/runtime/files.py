"""Files that survive a kill: durable, replaced in one step, and with errors that say what to do."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from hydra_rlhf.errors import CheckpointError


@contextmanager
def clear_write_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors in the block into a `CheckpointError` that names `path` and the way out."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(
            f"cannot write {path}: {reason}; the run folder must stay in place, writable and with free disk space; "
            "then continue with --resume"
        ) from error


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, durably and in one step: readers see the old file or the new one. Raises OSError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        sync(draft)
        draft.replace(path)
        sync(path.parent)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def acquire_lock(folder: Path) -> int:
    """Hold the folder's lock until the descriptor is closed or the process ends, however it ends."""
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
        os.close(lock)
        raise CheckpointError(
            f"{folder} is in use by process {holder or 'unknown'}; wait for it to end, stop it, or choose another name"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises `CheckpointError` where it is missing or no JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; has the run got that far?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; restore it from a copy") from error


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises `CheckpointError`."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; restore it from a copy") from error
