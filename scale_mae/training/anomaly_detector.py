"""Detect anomalies of a run: loss spikes and skipped steps.

A loss is a spike if it lies ``rollback.spike_threshold`` deviations above the median of the last ``rollback.window``
good losses. The deviation is 1.4826 times the median absolute deviation. For a normal distribution this equals the
standard deviation, and single outliers do not change it (Rousseeuw and Croux 1993).

Spikes and skipped steps are bad steps. They never enter the window. A good step cancels one earlier spike, not all of
them, so that a loss that spikes in most steps is an anomaly. The result for a step depends only on the steps before it. It
does not depend on when it is requested, so a resumed run gets the same result.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from scale_mae.config.schema import RollbackConfig

STD_PER_MAD = 1.4826  # standard deviation of a normal distribution divided by its median absolute deviation
# The least deviation, as a share of the median. Without it, every change of a constant loss would be a spike.
MIN_DEVIATION = 1e-3


@dataclass(frozen=True)
class Anomaly:
    """Too many bad steps: spikes, or skipped steps.

    Attributes:
        first_step: The first bad step, counted from 1.
        last_step: The last bad step, which exceeded the limit.
        reason: ``loss spikes`` or ``non-finite gradients``.
    """

    first_step: int
    last_step: int
    reason: str


class AnomalyDetector:
    """Checks the steps of a run one after another.

    Args:
        config: The thresholds.
        state: :meth:`state` from a checkpoint.
    """

    def __init__(self, config: RollbackConfig, state: Mapping[str, Any] | None = None) -> None:
        state = state or {"losses": [], "first_step": 0, "spikes": 0, "skipped": 0}
        self._config = config
        self._losses: deque[float] = deque(state["losses"], maxlen=config.window)
        self._first_step = int(state["first_step"])
        self._spikes, self._skipped = int(state["spikes"]), int(state["skipped"])

    @property
    def suspicious(self) -> bool:
        """Whether there are bad steps that good steps have not canceled yet. They may become an anomaly."""
        return bool(self._spikes or self._skipped)

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "losses": list(self._losses),
            "first_step": self._first_step,
            "spikes": self._spikes,
            "skipped": self._skipped,
        }

    def add_step(self, step: int, loss: float, skipped: bool) -> Anomaly | None:
        """Add the next step, and return an anomaly if there are too many bad steps.

        Args:
            step: Number of the step, counted from 1.
            loss: Loss of its global batch.
            skipped: Whether the step was skipped because its gradients were not finite.
        """
        skipped = skipped or not math.isfinite(loss)
        spike = not skipped and self._is_spike(loss)
        if not (skipped or spike):
            self._losses.append(loss)
            self._spikes, self._skipped = max(0, self._spikes - 1), 0
            return None
        if not self.suspicious:
            self._first_step = step
        self._spikes += spike
        self._skipped += skipped
        if self._spikes >= self._config.max_spikes:
            return Anomaly(self._first_step, step, "loss spikes")
        if self._skipped >= self._config.max_skipped_steps:
            return Anomaly(self._first_step, step, "non-finite gradients")
        return None

    def _is_spike(self, loss: float) -> bool:
        if self._config.spike_threshold is None or len(self._losses) < self._config.window:
            return False
        center = median(self._losses)
        deviation = STD_PER_MAD * median(abs(other - center) for other in self._losses)
        return loss - center > self._config.spike_threshold * max(deviation, MIN_DEVIATION * abs(center))
