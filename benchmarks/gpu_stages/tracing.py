"""What torch's profiler records of a few steps, as numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from training import wait

MARK = "recorded steps"
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")  # and those whose names go on, such as cudaLaunchKernelExC
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize", "cuCtxSynchronize")
COPIES = "Memcpy DtoH"


def recorded(steps: Callable[[], object], device: torch.device) -> list[Any]:
    """The profiler's events of some steps; the host's part of them is within an event called :data:`MARK`."""
    wait(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, acc_events=False) as recording:
        with record_function(MARK):
            steps()
        wait(device)
    return list(recording.profiler.kineto_results.events())


def summary(events: Iterable[Any], steps: int) -> dict[str, Any]:
    """Kernels, idle time of the GPU, launches and waits of one step on average.

    A rehearsal has no kernels: ``launches`` are 0 and ``operators`` shows that there was work.
    """
    events = list(events)
    mark = next(event for event in events if event.name() == MARK and event.device_type() == DeviceType.CPU)
    first, last = mark.start_ns(), mark.start_ns() + mark.duration_ns()
    host = [e for e in events if e.device_type() == DeviceType.CPU and first <= e.start_ns() < last]
    kernels = on_device(events)
    intervals = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in kernels]
    busy, span = covered(intervals), (max(end for _, end in intervals) - min(start for start, _ in intervals) if kernels else 0)
    return {
        "kernels": sum(not e.name().startswith("Mem") for e in kernels) / steps,
        "copies": sum(e.name().startswith("Mem") for e in kernels) / steps,
        "kernel_s": sum(end - start for start, end in intervals) / 1e9 / steps,
        "busy_s": busy / 1e9 / steps,
        "idle_s": (span - busy) / 1e9 / steps,
        "longest_gaps_s": [gap / 1e9 for gap in gaps(intervals)[:5]],
        "launches": sum(e.name().startswith(LAUNCHES) for e in host) / steps,
        "operators": sum(e.name().startswith("aten::") for e in host) / steps,
        "waits": {name: sum(e.name() == name for e in host) / steps for name in WAITS},
        "copies_to_host": sum(e.name().startswith(COPIES) for e in kernels) / steps,
    }


def on_device(events: Iterable[Any]) -> list[Any]:
    """Kernels and copies of the GPU; without the ranges that the profiler draws there for what the host has named."""
    return [e for e in events if e.device_type() == DeviceType.CUDA and e.name() != MARK and not e.is_user_annotation()]


def covered(intervals: Iterable[tuple[int, int]]) -> int:
    """Length of the union of intervals."""
    total, reached = 0, None
    for start, end in sorted(intervals):
        if reached is None or start > reached:
            total, reached = total + end - start, end
        elif end > reached:
            total, reached = total + end - reached, end
    return total


def gaps(intervals: Iterable[tuple[int, int]]) -> list[int]:
    """Times between intervals, the longest first."""
    found, reached = [], None
    for start, end in sorted(intervals):
        if reached is not None and start > reached:
            found.append(start - reached)
        reached = end if reached is None else max(reached, end)
    return sorted(found, reverse=True)
