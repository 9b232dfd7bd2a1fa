"""What stopping takes: how long before a job's time limit a run has to begin."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

MARGIN = 30.0  # seconds to leave in, besides what is measured
SLOW = 2e8  # bytes a second that a save is expected to write, until one has been measured
SAVES, STEPS = 3, 20  # of which the slowest counts: one that hung long ago must not stop every job early for ever


class StopTimeEstimator:
    """The seconds that recent saves and steps took.

    Args:
        nbytes: of a checkpoint.
        saves: of the run's last ones; from its checkpoint.
    """

    def __init__(self, nbytes: int, saves: Sequence[float] = ()) -> None:
        self.saves = deque(saves or [nbytes / SLOW], maxlen=SAVES)
        self._steps: deque[float] = deque([0.0], maxlen=STEPS)

    def saved(self, seconds: float) -> None:
        """A save has ended."""
        self.saves.append(seconds)

    def stepped(self, seconds: float) -> None:
        """A step has ended."""
        self._steps.append(seconds)

    @property
    def lead_seconds(self) -> float:
        """Twice the slowest recent save, as the disk may be busier then; two steps, as the vote of one counts in the next."""
        return 2 * max(self.saves) + 2 * max(self._steps) + MARGIN
