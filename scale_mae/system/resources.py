"""What this process may use of the machine: cores and memory, under the limits of Slurm and containers."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")


def processes_here() -> int:
    """Processes of this job on this machine, from the launcher."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes this process may still allocate before the machine or its control group runs out."""
    return min([psutil.virtual_memory().available, *_cgroup_room()])


def _cgroup_room() -> list[int]:
    """Bytes left in each control group this process is in, those above it included."""
    room = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            names = ("memory.max", "memory.current") if not controllers else ("memory.limit_in_bytes", "memory.usage_in_bytes")
            top = CGROUPS / controllers
            folder = top / path.lstrip("/")
            for group in [folder, *folder.parents]:
                if group.is_relative_to(top):
                    room += _room(group, *names)
    return room


def _room(group: Path, limit: str, usage: str) -> list[int]:
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # the cache of files is given up as soon as somebody needs the memory
        cache = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
        return [max(0, int((group / limit).read_text()) - int((group / usage).read_text()) + cache)]
    except (OSError, ValueError):  # no such group here, or its limit is "max"
        return []
