"""The speed of the shared run directory, whether all nodes share it, and free space."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MB = 10**6
FILE_BYTES = 64 * MB
HEAD_BYTES = 32


@dataclass(frozen=True)
class StorageResult:
    """A test file in the run directory.

    Attributes:
        file_name: Name of the file.
        head: The first bytes of the file.
        write_mb_per_s: Speed of writing the file to the disk, in MB/s.
        read_mb_per_s: Speed of reading the file, in MB/s.
    """

    file_name: str
    head: bytes
    write_mb_per_s: float
    read_mb_per_s: float


def write_and_read_file(file: Path, seconds: float) -> StorageResult:
    """Write a file, wait until it is stored, and read it. Reading bypasses this node's cache if the kernel allows it.

    Args:
        file: Path of the file. Its folder is created.
        seconds: Time limit for writing and for reading. If it is too short, only a part of the file is written: when many
            nodes write at the same time, each one gets a small share of a sound file system.

    Raises:
        OSError: The file cannot be written, or its content differs from what was written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    content = os.urandom(FILE_BYTES)
    with open(file, "wb") as output:

        def write(begin: int, end: int) -> None:
            output.write(content[begin:end])
            output.flush()
            os.fsync(output.fileno())

        written, write_speed = _move_in_pieces(write, FILE_BYTES, seconds)
        os.posix_fadvise(output.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with open(file, "rb") as input_:

        def read(begin: int, end: int) -> None:
            if input_.read(end - begin) != content[begin:end]:
                raise OSError(0, "the file contains other bytes than were written")

        _, read_speed = _move_in_pieces(read, written, seconds)
    return StorageResult(file.name, content[:HEAD_BYTES], write_speed, read_speed)


def _move_in_pieces(move: Callable[[int, int], None], size: int, seconds: float) -> tuple[int, float]:
    """Move bytes in pieces, each as large as all previous ones together, until the next piece would take too long.

    Args:
        move: Moves the bytes from a begin to an end.
        size: Number of bytes.
        seconds: Time limit.

    Returns:
        The number of bytes moved, and the speed of the last piece in MB/s. The last piece is half of the bytes.
    """
    done, piece, start = 0, FILE_BYTES // 64, time.perf_counter()
    while True:
        piece_start = time.perf_counter()
        move(done, done + piece)
        now = time.perf_counter()
        done, speed = done + piece, piece / MB / (now - piece_start)
        if done >= size or 2 * (now - start) > seconds:
            return done, speed
        piece = done


def find_nodes_with_missing_files(folder: Path, files: dict[str, StorageResult], seconds: float = 3.0) -> list[str]:
    """Return the nodes whose files are not visible here.

    Args:
        folder: The folder to which all nodes write.
        files: The file of each node, by name of the node.
        seconds: How long to wait. A network file system may show a new file a little later.
    """
    missing, deadline = dict(files), time.monotonic() + seconds
    while True:
        missing = {node: file for node, file in missing.items() if not _is_visible(folder, file)}
        if not missing or time.monotonic() > deadline:
            return list(missing)
        time.sleep(0.1)


def _is_visible(folder: Path, file: StorageResult) -> bool:
    try:
        with open(folder / file.file_name, "rb") as opened:
            return opened.read(HEAD_BYTES) == file.head
    except OSError:
        return False


def get_free_bytes(folders: dict[str, Path]) -> dict[str, int]:
    """Return the free space of each folder in bytes. A folder that does not exist counts as its nearest existing parent."""
    free = {}
    for label, folder in folders.items():
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free[label] = shutil.disk_usage(existing).free
    return free
