"""A folder on each node's own disk that a save goes to first; from there a thread brings it to the run directory."""

from __future__ import annotations

import hashlib
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from scale_mae.checkpoint.store import CheckpointError
from scale_mae.distributed.process_group import World
from scale_mae.system.files import check_space


class LocalFolder:
    """This process's part of ``checkpoint.local_dir``. All processes make one, and call the same methods.

    Args:
        root: ``checkpoint.local_dir``.
        run_dir: its path names a folder in ``root``, so that runs may share a disk.
        world: the processes.

    Attributes:
        path: where this process writes.

    Raises:
        CheckpointError: it cannot be used.
    """

    def __init__(self, root: str, run_dir: Path, world: World) -> None:
        run = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
        self.path, self._world = Path(root) / f"scale_mae-{run}" / f"rank-{world.rank}", world
        if world.local_rank == 0:
            shutil.rmtree(self.path.parent, ignore_errors=True)  # left by a process that was killed
        world.barrier()
        disks = world.all_gather(world.run_on_all(lambda: self._first(root)))
        self._sharing = [rank for rank, disk in enumerate(disks) if disk == disks[world.rank]]

    def prepare(self, final: Path, nbytes: int, main_only_nbytes: int) -> None:
        """Empty it, and look whether its disk has room for what all processes that share it may write.

        Args:
            final: the checkpoint that is lost if not.
            nbytes: of a whole checkpoint, at most.
            alone: of these, what the first process writes; the others are written by all in like shares.

        Raises:
            CheckpointError: on every process, if any cannot begin.
        """
        self._world.run_on_all(lambda: lost(self._empty, final, self.path))
        needed = (nbytes - main_only_nbytes) * len(self._sharing) // self._world.size + (
            main_only_nbytes if self._world.is_main else 0
        )
        speaks = self._sharing[0] == self._world.rank  # one for each disk, when all have emptied their parts
        self._world.run_on_all(lambda: lost(lambda: check_space(self.path, needed if speaks else 0), final, self.path))

    def clear(self) -> None:
        """Delete what is in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def remove(self) -> None:
        """Delete it; the last process deletes the run's folder with it."""
        self.clear()
        with suppress(OSError):
            self.path.parent.rmdir()

    def _first(self, root: str) -> tuple[str, int]:
        try:
            return self._empty()
        except OSError as error:
            where = "name a folder on each node's own disk, or none"
            raise CheckpointError(f"checkpoint.local_dir={root}: cannot be written ({error.strerror}); {where}") from None

    def _empty(self) -> tuple[str, int]:
        """The disk it is on."""
        self.clear()
        self.path.mkdir(parents=True)
        return socket.gethostname(), self.path.stat().st_dev


def lost(action: Callable[[], Any], final: Path, where: Path | None = None) -> Any:
    """Run ``action``; what the disk has against it becomes the loss of the checkpoint ``final``, not of the run.

    Args:
        action: what may fail.
        final: the checkpoint.
        where: the place that was written to, if it is another.

    Raises:
        CheckpointError: for an OSError.
    """
    try:
        return action()
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        place = f"{where}: " if where else ""
        raise CheckpointError(f"{final}: not written ({place}{reason}); earlier checkpoints are untouched") from error
