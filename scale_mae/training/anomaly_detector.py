"""Is a run healthy? Told from every step's loss and from the steps that were left out, one after another.

A loss is too high when it lies ``rollback.spike_threshold`` deviations above the median of the last ``rollback.window``
good ones. The deviation
is 1.4826 times the median absolute one: for a normal distribution the standard deviation, and not moved by single outliers
(Rousseeuw and Croux 1993). A bad step, too high or left out, never enters the window. A good step takes back one that was
too high, no more, so that a loss which is too high most of the time is not forgiven for the rest. The verdict on a step
depends on the steps before it alone, not on when it is asked for, so that a resumed run comes to the same.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from scale_mae.config.sections import RollbackConfig

NORMAL = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
LEAST = 1e-3  # of the median: a smaller deviation counts as this, so that losses that hardly differ are not all spikes


@dataclass(frozen=True)
class Anomaly:
    """A run has gone bad.

    Attributes:
        first: first bad step, counted from 1.
        last: the one that was too many.
        reason: what was wrong with them.
    """

    first: int
    last: int
    reason: str


class AnomalyDetector:
    """Judges steps.

    Args:
        config: how many bad steps are too many.
        state: from a checkpoint.
    """

    def __init__(self, config: RollbackConfig, state: Mapping[str, Any] | None = None) -> None:
        state = state or {"losses": [], "first": 0, "high": 0, "skipped": 0}
        self._config = config
        self._losses: deque[float] = deque(state["losses"], maxlen=config.window)
        self._first, self._high, self._skipped = int(state["first"]), int(state["high"]), int(state["skipped"])

    @property
    def suspicious(self) -> bool:
        """Whether bad steps are not outweighed yet by good ones, so that nobody knows what the run is worth."""
        return bool(self._high or self._skipped)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"losses": list(self._losses), "first": self._first, "high": self._high, "skipped": self._skipped}

    def add(self, step: int, loss: float, skipped: bool) -> Anomaly | None:
        """Judge the next step.

        Args:
            step: its number, counted from 1.
            loss: of its global batch.
            skipped: its gradients were not finite and it was left out.
        """
        skipped = skipped or not math.isfinite(loss)
        high = not skipped and self._is_high(loss)
        if not (skipped or high):
            self._losses.append(loss)
            self._high, self._skipped = max(0, self._high - 1), 0
            return None
        if not self.suspicious:
            self._first = step
        self._high += high
        self._skipped += skipped
        if self._high >= self._config.max_spikes:
            return Anomaly(self._first, step, "the loss was too high")
        if self._skipped >= self._config.max_skipped_steps:
            return Anomaly(self._first, step, "gradients were not finite")
        return None

    def _is_high(self, loss: float) -> bool:
        if self._config.spike_threshold is None or len(self._losses) < self._config.window:
            return False
        middle = median(self._losses)
        deviation = NORMAL * median(abs(other - middle) for other in self._losses)
        return loss - middle > self._config.spike_threshold * max(deviation, LEAST * abs(middle))
