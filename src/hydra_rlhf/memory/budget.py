"""How many bytes a run may use: what the settings say, or most of what is free on its device."""

from pathlib import Path

import torch

from hydra_rlhf.config import MemoryConfig
from hydra_rlhf.config_checks import parse_bytes

FREE_SHARE = 0.85
"""Of the free memory, with `memory.budget=auto`; the rest is for what others on the machine begin to use."""
PROCESS_BYTES = 448 * 2**20
"""What a named budget leaves for the process itself: the libraries, or the CUDA context and its workspaces."""
CGROUP_FILES = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
"""Limit and usage of a container, of either version of control groups."""


def tensor_budget(config: MemoryConfig, device: torch.device, *, held: int = 0) -> int:
    """Bytes that tensors may take on `device`, those included that are there already (`held`)."""
    if config.budget != "auto":
        return max(0, parse_bytes(config.budget) - PROCESS_BYTES)
    return held + int(FREE_SHARE * free_bytes(device))


def free_bytes(device: torch.device) -> int:
    """Free memory of a CUDA device, or of the machine within its container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 8 * 2**30
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    for limit, usage in CGROUP_FILES:
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            free = min(free, int(text) - int(usage.read_text()))
    return max(0, free)
