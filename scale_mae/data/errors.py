"""Errors of sources and images, and the status that an index records for every image."""

from __future__ import annotations

from enum import IntEnum

from scale_mae.config import UserError


class DataError(UserError):
    """A source that cannot be used, or an unreadable image that cannot be skipped."""


class ImageStatus(IntEnum):
    """Status of an image in an index.

    Below ``DECODED`` the image is not checked yet. ``DECODED`` and ``HEADER_READ`` images are usable. From ``EMPTY`` on, the
    status is the reason why the image is in quarantine.
    """

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
        """The status in words."""
        texts = {16: "empty file", 20: "too many pixels", 21: "crashes the decoder"}
        return texts.get(self, self.name.lower().replace("_", " "))


class ImageError(Exception):
    """An unreadable image.

    Attributes:
        cause: The kind of failure.
        reason: What exactly failed, in one line.
    """

    def __init__(self, cause: ImageStatus, reason: str) -> None:
        super().__init__(cause, reason)
        self.cause, self.reason = cause, " ".join(reason.split())

    def __str__(self) -> str:
        return f"{self.cause.text} ({self.reason})"


def escape_unprintable(text: str) -> str:
    """Escape characters that a terminal or log cannot show. The result is one line, whatever a file is called."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
