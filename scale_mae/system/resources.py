"""Cores and memory that this process may use, within the limits of Slurm and containers."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")


def processes_on_node() -> int:
    """Return the number of processes of this job on this node, as the launcher set it."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def available_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Return the bytes that this process can allocate before the node or its control group runs out of memory."""
    return min([psutil.virtual_memory().available, *_free_memory_of_cgroups()])


def _free_memory_of_cgroups() -> list[int]:
    """Return the free bytes of each control group of this process and of the groups above it, if they have a limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    free = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):  # cgroup version 2 and 1
            names = ("memory.max", "memory.current") if not controllers else ("memory.limit_in_bytes", "memory.usage_in_bytes")
            top = CGROUPS / controllers
            folder = top / path.lstrip("/")
            for group in [folder, *folder.parents]:
                if group.is_relative_to(top):
                    free += _free_memory(group, *names)
    return free


def _free_memory(group: Path, limit: str, usage: str) -> list[int]:
    """Return the free bytes of a control group, as a list with one value, or none if the group has no limit."""
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # the kernel gives up the file cache when memory is needed
        cache = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
        return [max(0, int((group / limit).read_text()) - int((group / usage).read_text()) + cache)]
    except (OSError, ValueError):  # the group does not exist, or its limit is "max"
        return []
