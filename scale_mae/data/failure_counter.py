"""Images that could not be had in training: named, counted by cause, and held against a ceiling."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scale_mae.data.errors import DataError, ImageStatus

WINDOW = 100_000  # images


class DecodeFailure(NamedTuple):
    """An image that was replaced by another one."""

    position: int
    location: str
    cause: ImageStatus
    reason: str
    substitute: str

    def __str__(self) -> str:
        return f"{self.location}: {self.cause.text} ({self.reason}); replaced by {self.substitute}"


class FailureCounter:
    """Failures of all processes of a run; travels in its checkpoints.

    Attributes:
        causes: how many so far, by cause.
    """

    def __init__(self, ceiling: float, state: Mapping[str, Any] | None = None) -> None:
        state = state or {"causes": {}, "recent": []}
        self.counts = Counter({ImageStatus(cause): number for cause, number in state["causes"].items()})
        self._ceiling = ceiling
        self._recent: deque[tuple[int, int]] = deque(map(tuple, state["recent"]))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"causes": {int(cause): number for cause, number in self.counts.items()}, "recent": list(self._recent)}

    def add(self, images: int, failures: Sequence[DecodeFailure]) -> None:
        """Count failures found until ``images`` images had been seen."""
        self.counts.update(failure.cause for failure in failures)
        if failures:
            self._recent.append((images, len(failures)))
        while self._recent and self._recent[0][0] <= images - WINDOW:
            self._recent.popleft()

    def check(self, images: int, failures: Sequence[DecodeFailure]) -> None:
        """Hold what was last added against the ceiling. Data that was put right is no longer held against a run.

        Raises:
            DataError: more than the ceiling allows among the last 100,000 images.
        """
        recent, allowed = sum(count for _, count in self._recent), self._ceiling * WINDOW
        if failures and recent > allowed:
            counts = ", ".join(f"{number} {cause.text}" for cause, number in self.counts.most_common())
            raise DataError(
                f"{recent} of the last {min(images, WINDOW)} images could not be used ({counts} so far), more than "
                f"data.max_failure_ratio={self._ceiling:g} of {WINDOW}; the last one: {failures[-1]}"
            )
