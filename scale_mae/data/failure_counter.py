"""Counts the unreadable images of a run by cause, and stops the run when there are too many."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scale_mae.data.errors import DataError, ImageStatus

WINDOW = 100_000  # images


class DecodeFailure(NamedTuple):
    """An unreadable image and its substitute.

    Attributes:
        position: The position in the sample plan.
        location: Path of the image, with ``@offset`` inside a shard.
        cause: The kind of failure.
        reason: What exactly failed.
        substitute: Location of the image that replaces it.
    """

    position: int
    location: str
    cause: ImageStatus
    reason: str
    substitute: str

    def __str__(self) -> str:
        return f"{self.location}: {self.cause.text} ({self.reason}); replaced by {self.substitute}"


class FailureCounter:
    """Counts the failures of all processes of a run. Checkpoints contain its state.

    Args:
        max_ratio: Largest fraction of failures among the last 100,000 images.
        state: A state from :meth:`state_dict`.

    Attributes:
        counts: Number of failures by cause since the start of the run.
    """

    def __init__(self, max_ratio: float, state: Mapping[str, Any] | None = None) -> None:
        state = state or {"causes": {}, "recent": []}
        self.counts = Counter({ImageStatus(cause): number for cause, number in state["causes"].items()})
        self._max_ratio = max_ratio
        self._recent: deque[tuple[int, int]] = deque(map(tuple, state["recent"]))

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"causes": {int(cause): number for cause, number in self.counts.items()}, "recent": list(self._recent)}

    def add(self, images: int, failures: Sequence[DecodeFailure]) -> None:
        """Count the failures since the last call; ``images`` is the number of images since the start of the run."""
        self.counts.update(failure.cause for failure in failures)
        if failures:
            self._recent.append((images, len(failures)))
        while self._recent and self._recent[0][0] <= images - WINDOW:
            self._recent.popleft()

    def check(self, images: int, failures: Sequence[DecodeFailure]) -> None:
        """Check the limit after :meth:`add`. Without new failures nothing is raised, so a run with repaired data can continue.

        Raises:
            DataError: There are more failures among the last 100,000 images than the limit allows.
        """
        recent, allowed = sum(count for _, count in self._recent), self._max_ratio * WINDOW
        if failures and recent > allowed:
            counts = ", ".join(f"{number} {cause.text}" for cause, number in self.counts.most_common())
            raise DataError(
                f"{recent} of the last {min(images, WINDOW)} images were unreadable ({counts} since the start), more than "
                f"data.max_failure_ratio={self._max_ratio:g} of {WINDOW}. The last one: {failures[-1]}. Check the data and the "
                "storage."
            )
