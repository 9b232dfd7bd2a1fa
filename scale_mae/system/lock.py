"""A lock file that only one process can hold."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from scale_mae.config import UserError


def _print_to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@contextmanager
def exclusive_lock(lock: Path, what: str, warn: Callable[[str], None] = _print_to_stderr) -> Iterator[None]:
    """Hold a lock. The kernel, or the server on NFS, releases it when this process ends for any reason.

    Args:
        lock: The lock file. Its folder is created, and the file is deleted at the end.
        what: Start of the error for a second process, such as "runs/demo is in use". The name of the holder follows.
        warn: Receives a warning if the file system has no locks.

    Raises:
        UserError: Another process holds the lock, or the file cannot be written.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "a+")
    except OSError as error:
        raise UserError(f"{lock.parent}: cannot be written ({error.strerror}). Choose another folder.") from None
    with file:
        try:
            _acquire(file)
            acquired = os.path.samestat(os.fstat(file.fileno()), os.stat(lock))  # not a file that its holder just deleted
        except (BlockingIOError, FileNotFoundError):
            acquired = False
        except OSError as error:
            acquired = True
            warn(f"{lock}: the file system has no locks ({error.strerror}). Make sure that no second job uses this folder.")
        if not acquired:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(f"{what} by {holder}. Wait until it has ended, or stop it.")
        with suppress(OSError):  # the disk is full: the lock is held without the name of the holder
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), _name_of_this_process().encode())  # unbuffered, so that closing does not write again
        try:
            yield
        finally:
            with suppress(OSError):  # the disk became read-only: a lock file that nobody holds blocks nobody
                lock.unlink()


def _acquire(file: TextIO) -> None:
    """Acquire the lock. Try four times, because :func:`lock_holder` in another process holds it for a moment."""
    for last_try in (False, False, False, True):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if last_try:
                raise
            time.sleep(0.1)


def lock_holder(lock: Path) -> str | None:
    """Return the holder of a lock, such as ``process 12 on node7, Slurm job 3``, or None if nobody holds it."""
    try:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        with suppress(OSError):
            return lock.read_text().strip() or "another process"
    except OSError:
        pass
    return None


def _name_of_this_process() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"process {os.getpid()} on {socket.gethostname()}" + (f", Slurm job {job}" if job else "")
