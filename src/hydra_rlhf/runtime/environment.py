"""What a run was made with and on: versions, hardware, commit. Nothing of the process environment is recorded."""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("hydra-rlhf", "torch", "transformers", "datasets", "safetensors", "bitsandbytes")

SECRETS = (
    (re.compile(r"(?<=://)[^/\s@]+(?=@)"), "***"),  # user:password@ of an address
    (re.compile(r"(?i)([?&][\w-]*(?:token|key|secret|password|signature|credential)[\w-]*=)[^&\s]+"), r"\1***"),
    # Access tokens by their known beginnings; long enough that no model is named like that.
    (re.compile(r"\b(?:hf_[A-Za-z0-9]{30,}|ghp_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{40,})"), "***"),
)
"""What a secret looks like inside a string, and what is written in its place."""


def redact(value: Any) -> Any:
    """`value` with everything that looks like a secret replaced by `***`, in strings at any depth."""
    if isinstance(value, str):
        for pattern, replacement in SECRETS:
            value = pattern.sub(replacement, value)
        return value
    if isinstance(value, dict):
        return {key: redact(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [redact(entry) for entry in value]
    return value


def describe_environment() -> dict[str, Any]:
    """The content of `environment.json`: {versions, hardware, git, started}; git is None outside a git checkout."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "hardware": _hardware(),
        "git": _git(Path(__file__).parent),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None  # an extra nobody asked for, or a source tree that was not installed


def _hardware() -> dict[str, Any]:
    cuda = None
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        cuda = {"name": device.name, "memory_bytes": device.total_memory, "runtime": torch.version.cuda}
    return {
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cuda": cuda,
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout this package runs from, and whether its files were changed since."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Only if git tracks this very file: an installed package may lie inside somebody else's checkout.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None or (commit := git("rev-parse", "HEAD")) is None:
        return None
    return {"commit": commit, "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}
