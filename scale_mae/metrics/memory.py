"""The memory that processes use, on the GPU and on the host."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from typing import NamedTuple

import psutil
import torch


class MemoryUsage(NamedTuple):
    """Memory of one process in bytes.

    Attributes:
        gpu_allocated: Peak of the memory allocated on its GPU; ``None`` without a GPU.
        gpu_reserved: Memory that PyTorch currently reserves on its GPU; ``None`` without a GPU.
        host_rss: Resident memory on the host.
    """

    gpu_allocated: int | None
    gpu_reserved: int | None
    host_rss: int


def memory_usage(device: torch.device) -> MemoryUsage:
    """Return the memory of this process, which uses ``device``."""
    host_rss = psutil.Process().memory_info().rss
    if device.type != "cuda":
        return MemoryUsage(None, None, host_rss)
    return MemoryUsage(torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device), host_rss)


def max_memory(processes: Sequence[MemoryUsage]) -> MemoryUsage:
    """Return the largest value of each kind of memory among the processes."""
    allocated = [usage.gpu_allocated for usage in processes if usage.gpu_allocated is not None]
    reserved = [usage.gpu_reserved for usage in processes if usage.gpu_reserved is not None]
    return MemoryUsage(max(allocated, default=None), max(reserved, default=None), max(usage.host_rss for usage in processes))


def peak_memory_bytes() -> int:
    """Return the peak memory of this process: allocated on its GPU, or resident on the host without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
