"""One process at a time: a lock beside what is being written."""

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


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@contextmanager
def exclusive_lock(lock: Path, what: str, warn: Callable[[str], None] = _to_stderr) -> Iterator[None]:
    """Hold a lock. The kernel (on NFS the server) lets go of it when this process ends, however it ends.

    Args:
        lock: the file, deleted in the end; its folder is made.
        what: to tell the second one, such as "runs/demo is in use"; who has it is added.
        warn: told of a file system that has no locks.

    Raises:
        UserError: another process holds it, or nothing can be written there.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "a+")
    except OSError as error:
        raise UserError(f"{lock.parent}: cannot be written ({error.strerror}); choose another place") from None
    with file:
        try:
            _lock(file)
            mine = os.path.samestat(os.fstat(file.fileno()), os.stat(lock))  # not one that its holder has just removed
        except (BlockingIOError, FileNotFoundError):
            mine = False
        except OSError as error:
            mine = True
            warn(f"{lock}: its file system has no locks ({error.strerror}); nothing keeps a second job out")
        if not mine:
            file.seek(0)
            raise UserError(f"{what} by {file.read().strip() or 'another process'}; wait for it, or stop it")
        with suppress(OSError):  # a full disk: the lock holds all the same, only without a name
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), _me().encode())  # not through a buffer, which closing would try to write again
        try:
            yield
        finally:
            with suppress(OSError):  # a disk that became read-only; a lock that nobody holds keeps nobody out
                lock.unlink()


def _lock(file: TextIO) -> None:
    """Take the lock; who only looks at it (:func:`lock_holder`) has it for a moment."""
    for last in (False, False, False, True):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if last:
                raise
            time.sleep(0.1)


def lock_holder(lock: Path) -> str | None:
    """Who holds a lock, such as ``process 12 on node7, Slurm job 3``; None: nobody."""
    try:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        with suppress(OSError):
            return lock.read_text().strip() or "another process"
    except OSError:
        pass
    return None


def _me() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"process {os.getpid()} on {socket.gethostname()}" + (f", Slurm job {job}" if job else "")
