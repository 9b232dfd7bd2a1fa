"""How long before the job's time limit a run must stop, so that its last save finishes in time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

MARGIN_SECONDS = 30.0  # added to what is measured
ASSUMED_WRITE_SPEED = 2e8  # bytes per second of a save, until one has been measured
# The slowest of so many recent saves and steps counts. One that hung long ago must not make every later job stop early.
RECENT_SAVES, RECENT_STEPS = 3, 20


class StopTimeEstimator:
    """Estimates the time to stop from the durations of recent saves and steps.

    Args:
        checkpoint_bytes: Size of a checkpoint, for the estimate before the first save.
        save_seconds: Durations of the run's recent saves, from its checkpoint.

    Attributes:
        save_seconds: Durations of recent saves.
    """

    def __init__(self, checkpoint_bytes: int, save_seconds: Sequence[float] = ()) -> None:
        self.save_seconds = deque(save_seconds or [checkpoint_bytes / ASSUMED_WRITE_SPEED], maxlen=RECENT_SAVES)
        self._step_seconds: deque[float] = deque([0.0], maxlen=RECENT_STEPS)

    def add_save(self, seconds: float) -> None:
        """Add the duration of a save."""
        self.save_seconds.append(seconds)

    def add_step(self, seconds: float) -> None:
        """Add the duration of a step."""
        self._step_seconds.append(seconds)

    @property
    def lead_seconds(self) -> float:
        """Seconds before the time limit at which the run must stop.

        The slowest recent save counts twice, because the disk may be busier at that time. The slowest recent step counts
        twice, because a vote takes effect one step later.
        """
        return 2 * max(self.save_seconds) + 2 * max(self._step_seconds) + MARGIN_SECONDS
