"""Measures the time and the memory of a command and of the processes that it starts."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Usage:
    """The time and memory of a command and of the processes that it started.

    Memory is private: it does not include file maps and pages that processes share.

    Attributes:
        seconds: Seconds until the command ended.
        largest: Peak memory in bytes of the process that used most.
        total: Peak memory in bytes of all processes together.
    """

    seconds: float
    largest: int
    total: int


def measure(command: list[str], *, interval: float = 0.2, quiet: bool = False) -> Usage:
    """Run a command and measure it. If it fails, exit.

    Args:
        command: The command.
        interval: Seconds between two measurements of memory.
        quiet: Whether to discard the output of the command.
    """
    start, largest, total = time.perf_counter(), 0, 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL if quiet else None) as process:
        parent = psutil.Process(process.pid)
        while process.poll() is None:
            sizes = []
            for member in [parent, *parent.children(recursive=True)]:
                try:
                    memory = member.memory_info()
                except psutil.Error:
                    continue
                sizes.append(memory.rss - memory.shared)
            largest, total = max(largest, *sizes, 0), max(total, sum(sizes))
            time.sleep(interval)
    if process.returncode:
        sys.exit(f"exit code {process.returncode} of: {' '.join(command)}")
    return Usage(time.perf_counter() - start, largest, total)
