"""Images that could not be had in training: named, counted by cause, and held against a ceiling."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

from scale_mae.data.storage import DataError, Status

WINDOW = 100_000  # images


class Failure(NamedTuple):
    """An image that was replaced by another one."""

    position: int
    where: str
    cause: Status
    reason: str
    replaced_by: str

    def __str__(self) -> str:
        return f"{self.where}: {self.cause.text} ({self.reason}); replaced by {self.replaced_by}"


class Tally:
    """Failures of all processes of a run.

    Attributes:
        causes: how many so far, by cause.
    """

    def __init__(self, ceiling: float) -> None:
        self.causes: Counter[Status] = Counter()
        self._ceiling = ceiling
        self._recent: deque[tuple[int, int]] = deque()

    def add(self, images: int, failures: Sequence[Failure]) -> None:
        """Count failures found until ``images`` images had been seen.

        Raises:
            DataError: more than the ceiling allows among the last 100,000 images.
        """
        self.causes.update(failure.cause for failure in failures)
        self._recent.append((images, len(failures)))
        while self._recent[0][0] <= images - WINDOW:
            self._recent.popleft()
        recent, allowed = sum(count for _, count in self._recent), self._ceiling * WINDOW
        if recent > allowed:
            causes = ", ".join(f"{number} {cause.text}" for cause, number in self.causes.most_common())
            raise DataError(
                f"{recent} of the last {min(images, WINDOW)} images could not be used ({causes}), more than "
                f"data.max_failures={self._ceiling:g} of {WINDOW}; the last one: {failures[-1] if failures else 'see log.txt'}"
            )
