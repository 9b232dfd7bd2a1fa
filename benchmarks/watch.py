"""What a command takes: time and memory, watched from outside."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Taken:
    """By a command and the processes that it started.

    Attributes:
        seconds: until it ended.
        private: bytes of the process that held most, without file maps and pages shared with others, at their peak.
        together: the same of all processes at one moment.
    """

    seconds: float
    private: int
    together: int


def watch(command: list[str], *, interval: float = 0.2, quiet: bool = False) -> Taken:
    """Run a command, looking at its memory every ``interval`` seconds; a failure ends the benchmark."""
    began, private, together = time.perf_counter(), 0, 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL if quiet else None) as process:
        family = psutil.Process(process.pid)
        while process.poll() is None:
            sizes = []
            for member in [family, *family.children(recursive=True)]:
                try:
                    memory = member.memory_info()
                except psutil.Error:
                    continue
                sizes.append(memory.rss - memory.shared)
            private, together = max(private, *sizes, 0), max(together, sum(sizes))
            time.sleep(interval)
    if process.returncode:
        sys.exit(f"failed with exit code {process.returncode}: {' '.join(command)}")
    return Taken(time.perf_counter() - began, private, together)
