"""Times the phases of a training step without waiting for the accelerator.

``StepTimer.mark(phase)`` assigns the time since the previous mark to ``phase``. On a GPU a mark records a CUDA event on the
stream, so a phase lasts as long as the device works on it. Waiting by the host while the device still computes is not visible.
The events are read at log steps, when the host waits for the device anyway. On a CPU a mark reads the clock.

    data        this rank waits for its batch
    vote        this rank waits until all other ranks have their batches
    forward     copy to the device, normalization, forward pass
    backward    backward pass; under ZeRO-2 and ZeRO-3 it includes the reduction of the gradients
    optimizer   optimizer update; under ZeRO-1 and ZeRO-2 it includes the all-gather of the weights
    checkpoint  training is paused to save or load a checkpoint
    evaluation  training is paused to evaluate the model
    other       the rest of the step, mostly logging
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import Module

PHASE_GROUPS: Mapping[str, tuple[str, ...]] = {  # logs and Prometheus report these groups of phases
    "data_loading": ("data", "vote"),
    "forward_backward": ("forward", "backward"),
    "optimizer": ("optimizer",),
    "checkpoint": ("checkpoint",),
    "evaluation": ("evaluation",),
    "other": ("other",),
}
PAUSE_PHASES = ("checkpoint", "evaluation")  # training is paused; most steps have none of them
LOCAL_PHASES = ("data", "forward")  # work of one rank that does not wait for others, except that ZeRO-3 gathers weights in it
MAX_PENDING = 4096  # number of unread events beyond which the completed ones are read early

PhaseSeconds = dict[str, float]


def group_phases(seconds: PhaseSeconds) -> dict[str, float]:
    """Return the seconds of a step by phase group. The additional key ``step`` is the sum without the pause phases."""
    groups = {group: sum(seconds.get(phase, 0.0) for phase in phases) for group, phases in PHASE_GROUPS.items()}
    return {"step": sum(seconds.values()) - sum(groups[phase] for phase in PAUSE_PHASES), **groups}


class StepTimer:
    """Measures the seconds of each phase of each step.

    Args:
        device: The device whose time is measured.

    Attributes:
        last_progress_time: Time at which the host last completed a step or a part of an evaluation, in seconds since 1970.
            ``None`` before the first step.
    """

    last_progress_time: float | None = None

    def __init__(self, device: torch.device) -> None:
        self._uses_events = device.type == "cuda"
        self._free_events: list[Any] = []
        self._pending: deque[tuple[str, Any, bool]] = deque()  # phase, timestamp, whether it ends a step
        self._steps: list[PhaseSeconds] = []
        self._current: PhaseSeconds = defaultdict(float)
        self._last = self._timestamp()

    def mark(self, phase: str) -> None:
        """Assign the time since the last mark to ``phase``."""
        self._pending.append((phase, self._timestamp(), False))

    def mark_forward(self, module: Module, *_: Any) -> None:
        """Mark the end of a forward pass in training. Register it as a forward hook of the model."""
        if module.training:
            self.mark("forward")

    def record_progress(self) -> None:
        """Record that the host makes progress, also when no step ends."""
        self.last_progress_time = time.time()

    def end_step(self) -> None:
        """End a step. The time since the last mark counts as ``other``."""
        self._pending.append(("other", self._timestamp(), True))
        self.record_progress()
        if len(self._pending) > MAX_PENDING:
            self._read_pending(wait=False)

    def read_steps(self) -> list[PhaseSeconds]:
        """Return the seconds by phase of each step that has ended since the last call. Waits for the device."""
        self._read_pending(wait=True)
        steps, self._steps = self._steps, []
        return steps

    def read_remainder(self) -> PhaseSeconds:
        """Return the seconds by phase since the last step, for use after the final step. Waits for the device."""
        self._read_pending(wait=True)
        remainder, self._current = dict(self._current), defaultdict(float)
        return remainder

    def _timestamp(self) -> Any:
        """Return the time of the clock, or an event that the device records when it reaches this point of the stream."""
        if not self._uses_events:
            return time.perf_counter()
        event: Any = self._free_events.pop() if self._free_events else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _read_pending(self, *, wait: bool) -> None:
        """Turn pending marks into seconds: all of them with ``wait``, otherwise those that the device has passed."""
        if wait and self._uses_events and self._pending:
            self._pending[-1][1].synchronize()
        while self._pending and (not self._uses_events or self._pending[0][1].query()):
            phase, timestamp, ends_step = self._pending.popleft()
            if self._uses_events:
                self._current[phase] += self._last.elapsed_time(timestamp) / 1000
                self._free_events.append(self._last)
            else:
                self._current[phase] += timestamp - self._last
            self._last = timestamp
            if ends_step:
                self._steps.append(dict(self._current))
                self._current.clear()
