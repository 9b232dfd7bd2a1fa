"""Errors of sources and images."""

from __future__ import annotations

from enum import IntEnum

from scale_mae.config import UserError


class DataError(UserError):
    """A source that cannot be used, or an image of it that cannot be done without."""


class ImageStatus(IntEnum):
    """What an index knows of an image: nothing yet, that it can be trained on, or, from ``EMPTY`` on, why it cannot."""

    PENDING = 0
    BEGUN = 1
    DECODED = 2
    HEADER_READ = 3
    EMPTY = 16
    UNREADABLE = 17
    NOT_AN_IMAGE = 18
    DAMAGED = 19
    TOO_LARGE = 20
    CRASHED = 21

    @property
    def text(self) -> str:
        """For people."""
        return {16: "no bytes", 20: "too many pixels", 21: "ends the decoder"}.get(self, self.name.lower().replace("_", " "))


class ImageError(Exception):
    """An image that cannot be had; ``cause`` counts it, the text says what exactly."""

    def __init__(self, cause: ImageStatus, reason: str) -> None:
        super().__init__(cause, reason)
        self.cause, self.reason = cause, " ".join(reason.split())

    def __str__(self) -> str:
        return f"{self.cause.text} ({self.reason})"


def escape_unprintable(text: str) -> str:
    """One line that any terminal and any log takes, whatever the files are called."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
