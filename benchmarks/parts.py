"""What the benchmarks of many parts share: what a part was measured on, and a result file that is renewed part by part.

Imports nothing heavy, see `memory_workload.py`.
"""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memory_peers import versions
from memory_workload import MIB


def circumstances(threads: int) -> dict[str, Any]:
    """When and on what a part was measured."""
    cpus = [line.partition(":")[2].strip() for line in read_lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "system": platform.system(),
        "cpu": cpus[0] if cpus else platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1024 * MIB), 1),
        "libc": " ".join(platform.libc_ver()),
        "threads": threads,
        "load_average_before": os.getloadavg(),
        "versions": versions(sys.executable),
    }


def read_lines(path: str) -> list[str]:
    """The lines of a file, none where there is no such file."""
    file = Path(path)
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def write_part(out: Path, name: str, content: dict[str, Any]) -> None:
    """Put one part into the result file; the others stay as they are."""
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result | {name: content}, indent=1) + "\n", encoding="utf-8")
    print(f"{name}: written to {out}", flush=True)
