"""Measure how long an action takes on a device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def measure_seconds(device: torch.device, action: Callable[[], object]) -> float:
    """Return the seconds until an action, and all work that it starts on the device, has finished."""
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter() - start
