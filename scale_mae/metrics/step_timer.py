"""Where the time of a step goes, measured without waiting for the accelerator.

A lap gives its name to the time since the lap before it. On a GPU a lap is an event recorded on the stream, so laps are those
of the device: that the host waits while the device still computes costs nothing and is not seen. Events are read at log steps,
when the host waits for the device anyway. On a CPU a lap is a reading of the clock.

    data        this process waited for its batch
    vote        it waited for the others to have theirs
    forward     copy to the device, normalisation, forward pass
    backward    backward pass; under ZeRO-2 and 3 gradients travel in it
    optimizer   the update; under ZeRO-1 and 2 weights travel in it
    checkpoint  training stood still for a save
    evaluation  likewise, for a look at the model
    other       the rest: log lines, mostly
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import Module

PHASE_GROUPS: Mapping[str, tuple[str, ...]] = {
    "data_loading": ("data", "vote"),
    "forward_backward": ("forward", "backward"),
    "optimizer": ("optimizer",),
    "checkpoint": ("checkpoint",),
    "evaluation": ("evaluation",),
    "other": ("other",),
}
PAUSE_PHASES = ("checkpoint", "evaluation")  # training stands still in these phases; most steps have none of them
LOCAL_PHASES = ("data", "forward")  # what a process does without waiting for others; but ZeRO-3's forward pass gathers weights
PENDING = 4096  # events after which those that have come to pass are read early

PhaseSeconds = dict[str, float]


def group_phases(laps: PhaseSeconds) -> dict[str, float]:
    """Seconds of a step by phase; ``step`` is all but checkpoint and evaluation."""
    found = {phase: sum(laps.get(name, 0.0) for name in names) for phase, names in PHASE_GROUPS.items()}
    return {"step": sum(laps.values()) - sum(found[name] for name in PAUSE_PHASES), **found}


class StepTimer:
    """Laps of steps.

    Args:
        device: whose time is taken.

    Attributes:
        stepped_at: when the host was last through with a step, or with a part of an evaluation, in seconds since 1970; None
            before the first one.
    """

    last_progress_time: float | None = None

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._spare: list[Any] = []
        self._pending: deque[tuple[str, Any, bool]] = deque()
        self._steps: list[PhaseSeconds] = []
        self._laps: PhaseSeconds = defaultdict(float)
        self._last = self._timestamp()

    def mark(self, name: str) -> None:
        """The time since the last lap was that of ``name``."""
        self._pending.append((name, self._timestamp(), False))

    def mark_forward(self, module: Module, *_: Any) -> None:
        """A forward hook of the model, where the loop has no place for a lap. The passes of an evaluation are none."""
        if module.training:
            self.mark("forward")

    def record_progress(self) -> None:
        """The host gets on, though not with a step."""
        self.last_progress_time = time.time()

    def end_step(self) -> None:
        """A step has ended; what was left of it was ``other``."""
        self._pending.append(("other", self._timestamp(), True))
        self.record_progress()
        if len(self._pending) > PENDING:
            self._settle(wait=False)

    def read_steps(self) -> list[PhaseSeconds]:
        """Seconds by name of each step that has ended since the last reading. This waits for the device."""
        self._settle(wait=True)
        steps, self._steps = self._steps, []
        return steps

    def read_remainder(self) -> PhaseSeconds:
        """Seconds by name since the last step, when no other is to come. This waits for the device."""
        self._settle(wait=True)
        read_remainder, self._laps = dict(self._laps), defaultdict(float)
        return read_remainder

    def _timestamp(self) -> Any:
        if not self._on_device:
            return time.perf_counter()
        event: Any = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _settle(self, *, wait: bool) -> None:
        if wait and self._on_device and self._pending:
            self._pending[-1][1].synchronize()
        while self._pending and (not self._on_device or self._pending[0][1].query()):
            name, mark, ends = self._pending.popleft()
            if self._on_device:
                self._laps[name] += self._last.elapsed_time(mark) / 1000
                self._spare.append(self._last)
            else:
                self._laps[name] += mark - self._last
            self._last = mark
            if ends:
                self._steps.append(dict(self._laps))
                self._laps.clear()
