"""Bytes of images: read from (shard, offset, length), retried when storage falters; and what can be wrong with them."""

from __future__ import annotations

import errno
import functools
import gzip
import os
import stat
import time
import zlib
from collections.abc import Callable
from enum import IntEnum
from typing import TypeVar

from scale_mae.config import UserError

T = TypeVar("T")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
BACK_OFF = (0.2, 1.0, 5.0)  # seconds before each further attempt
PERMANENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}
MAX_BYTES = 1 << 30  # of an encoded image
OPEN_SHARDS = 128  # kept open by a process; opening one is a round trip on network storage


class DataError(UserError):
    """A source that cannot be used, or an image of it that cannot be done without."""


class Status(IntEnum):
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

    def __init__(self, cause: Status, reason: str) -> None:
        super().__init__(cause, reason)
        self.cause, self.reason = cause, " ".join(reason.split())

    def __str__(self) -> str:
        return f"{self.cause.text} ({self.reason})"


class _Shard:
    """An open file that closes itself when nobody reads from it any more."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for a writer
        if not stat.S_ISREG(os.fstat(self.number).st_mode):
            raise OSError(errno.EISDIR, "not a regular file")

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)

    def read(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes; fewer where the file ends."""
        data = os.pread(self.number, length, offset)
        while len(data) < length and (more := os.pread(self.number, length - len(data), offset + len(data))):
            data += more  # network storage may give less at a time
        return data


_opened = functools.lru_cache(maxsize=OPEN_SHARDS)(_Shard)


def read(path: str, offset: int, length: int) -> bytes:
    """Part of a file. Transient errors are tried again with growing pauses.

    Raises:
        ImageError: UNREADABLE; the file is gone, shorter than it was, or storage kept failing.
    """
    if path.endswith("gz"):
        data = unpacked(path)[offset : offset + length]
    else:
        data = _patiently(path, _opened if offset else _Shard, lambda shard: shard.read(offset, length))
    if len(data) < length:
        raise ImageError(Status.UNREADABLE, f"the file ends at byte {offset + len(data)}; it changed since it was indexed")
    return data


def size(path: str) -> int:
    """Bytes of a file.

    Raises:
        ImageError: UNREADABLE, as for :func:`read`.
    """
    return _patiently(path, _Shard, lambda shard: os.fstat(shard.number).st_size)


def _patiently(path: str, open_shard: Callable[[str], _Shard], action: Callable[[_Shard], T]) -> T:
    for pause in (*BACK_OFF, None):
        try:
            return action(open_shard(path))
        except OSError as error:
            if pause is None or error.errno in PERMANENT:
                tries = "" if error.errno in PERMANENT else f", {len(BACK_OFF) + 1} tries"
                raise ImageError(Status.UNREADABLE, f"{error.strerror}{tries}") from None
            time.sleep(pause)
            open_shard = _Shard  # the one kept open may be stale
    raise AssertionError  # the last attempt returns or raises


@functools.lru_cache(maxsize=64)
def unpacked(path: str) -> bytes:
    """A gzipped shard, held in memory: for small sets only.

    Raises:
        ImageError: UNREADABLE.
    """
    try:
        with gzip.open(path) as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ImageError(Status.UNREADABLE, str(error)) from None


def printable(text: str) -> str:
    """One line that any terminal and any log takes, whatever the files are called."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
