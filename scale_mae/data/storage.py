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
from typing import TypeVar

from scale_mae.data.errors import ImageError, ImageStatus

T = TypeVar("T")
BACK_OFF = (0.2, 1.0, 5.0)  # seconds before each further attempt
PERMANENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}
MAX_BYTES = 1 << 30  # of an encoded image
OPEN_SHARDS = 128  # kept open by a process; opening one is a round trip on network storage


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
        data = decompress(path)[offset : offset + length]
    else:
        data = _patiently(path, _opened if offset else _Shard, lambda shard: shard.read(offset, length))
    if len(data) < length:
        raise ImageError(ImageStatus.UNREADABLE, f"the file ends at byte {offset + len(data)}; it changed since it was indexed")
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
                raise ImageError(ImageStatus.UNREADABLE, f"{error.strerror}{tries}") from None
            time.sleep(pause)
            open_shard = _Shard  # the one kept open may be stale
    raise AssertionError  # the last attempt returns or raises


@functools.lru_cache(maxsize=64)
def decompress(path: str) -> bytes:
    """A gzipped shard, held in memory: for small sets only.

    Raises:
        ImageError: UNREADABLE.
    """
    try:
        with gzip.open(path) as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ImageError(ImageStatus.UNREADABLE, str(error)) from None
