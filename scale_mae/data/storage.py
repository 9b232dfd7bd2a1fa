"""Reads the bytes of an image from its file or shard, and retries when the storage fails."""

from __future__ import annotations

import errno
import functools
import gzip
import os
import stat
import time
import zlib
from collections.abc import Callable
from typing import TypeVar

from scale_mae.data.errors import ImageError, ImageStatus

T = TypeVar("T")
RETRY_PAUSES = (0.2, 1.0, 5.0)  # seconds before each further attempt after an error
READ_TIMEOUTS = (30.0, 60.0, 120.0)  # seconds for each attempt when the storage does not answer
PERMANENT_ERRORS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}
MAX_IMAGE_BYTES = 1 << 30  # of an encoded image
MAX_OPEN_SHARDS = 128  # per process; opening a shard is a round trip on network storage


class _OpenFile:
    """An open file. It closes itself when the last reference to it is gone."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # without it, a pipe waits for a writer
        if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
            raise OSError(errno.EISDIR, "not a regular file")

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def read(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes, or fewer if the file ends before."""
        data = os.pread(self.descriptor, length, offset)
        while len(data) < length and (more := os.pread(self.descriptor, length - len(data), offset + len(data))):
            data += more  # network storage may return less than requested
        return data


_open_cached = functools.lru_cache(maxsize=MAX_OPEN_SHARDS)(_OpenFile)


def read(path: str, offset: int, length: int) -> bytes:
    """Read a range of a file. Transient errors are retried with growing pauses.

    Raises:
        ImageError: UNREADABLE: the file is missing, shorter than indexed, or the storage failed every time.
    """
    if path.endswith("gz"):
        data = decompress(path)[offset : offset + length]
    else:
        data = _retry(path, _open_cached if offset else _OpenFile, lambda file: file.read(offset, length))
    if len(data) < length:
        raise ImageError(
            ImageStatus.UNREADABLE, f"the file ends at byte {offset + len(data)}; it has changed since it was indexed"
        )
    return data


def file_size(path: str) -> int:
    """Return the size of a file in bytes.

    Raises:
        ImageError: UNREADABLE, as in :func:`read`.
    """
    return _retry(path, _OpenFile, lambda file: os.fstat(file.descriptor).st_size)


def _retry(path: str, open_file: Callable[[str], _OpenFile], action: Callable[[_OpenFile], T]) -> T:
    for pause in (*RETRY_PAUSES, None):
        try:
            return action(open_file(path))
        except OSError as error:
            if pause is None or error.errno in PERMANENT_ERRORS:
                attempts = "" if error.errno in PERMANENT_ERRORS else f", {len(RETRY_PAUSES) + 1} attempts"
                raise ImageError(ImageStatus.UNREADABLE, f"{error.strerror}{attempts}") from None
            time.sleep(pause)
            open_file = _OpenFile  # the cached file may be stale
    raise AssertionError  # the last attempt returns or raises


@functools.lru_cache(maxsize=64)
def decompress(path: str) -> bytes:
    """Return the contents of a gzip-compressed shard. They stay in memory, so this suits small data sets only.

    Raises:
        ImageError: UNREADABLE.
    """
    try:
        with gzip.open(path) as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ImageError(ImageStatus.UNREADABLE, str(error)) from None
