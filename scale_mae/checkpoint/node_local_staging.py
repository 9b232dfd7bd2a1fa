"""Staging on the local disk of each node (``checkpoint.local_dir``).

Training waits only until the files of a checkpoint are on the local disk. A thread of
:class:`scale_mae.checkpoint.saver.Saver` copies them to the run directory.
"""

from __future__ import annotations

import hashlib
import shutil
import socket
from contextlib import suppress
from pathlib import Path

from scale_mae.checkpoint.errors import CheckpointError, convert_os_errors
from scale_mae.distributed.process_group import World
from scale_mae.system.files import check_space

COPY_BLOCK_BYTES = 1 << 22


class LocalStaging:
    """The staging folder of this process on its node's local disk. All processes create one and call the same methods.

    Args:
        root: ``checkpoint.local_dir``.
        run_dir: Run directory. A hash of its path names the folder in ``root``, so that several runs can share a disk.
        world: The process group.

    Attributes:
        path: The folder of this process.

    Raises:
        CheckpointError: The folder cannot be created on one of the nodes.
    """

    def __init__(self, root: str, run_dir: Path, world: World) -> None:
        run_hash = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
        self.path, self._world = Path(root) / f"scale_mae-{run_hash}" / f"rank-{world.rank}", world
        if world.local_rank == 0:
            shutil.rmtree(self.path.parent, ignore_errors=True)  # leftovers of a killed process
        world.barrier()
        disks = world.all_gather(world.run_on_all(lambda: self._create(root)))
        self._ranks_on_disk = [rank for rank, disk in enumerate(disks) if disk == disks[world.rank]]

    def prepare(self, final: Path, max_bytes: int, main_only_bytes: int) -> None:
        """Empty the folder, and check that its disk has enough free space for all processes that share the disk.

        Args:
            final: Path of the checkpoint.
            max_bytes: Upper bound of the size of the whole checkpoint.
            main_only_bytes: The part of it that only rank 0 writes. The ranks write equal shares of the rest.

        Raises:
            CheckpointError: A process cannot write, or a disk is too small. It is raised on all processes.
        """
        self._world.run_on_all(lambda: convert_os_errors(self._empty, final, self.path))
        needed = (max_bytes - main_only_bytes) * len(self._ranks_on_disk) // self._world.size
        needed += main_only_bytes if self._world.is_main else 0
        # one process checks each disk, after all processes have emptied their folders
        if self._ranks_on_disk[0] != self._world.rank:
            needed = 0
        self._world.run_on_all(lambda: convert_os_errors(lambda: check_space(self.path, needed), final, self.path))

    def copy(self, files: list[Path], target: Path) -> dict[Path, str]:
        """Copy files from this folder to ``target``. Return the checksum of the original of each copy."""
        return {(copy := target / path.relative_to(self.path)): _copy(path, copy) for path in files}

    def clear(self) -> None:
        """Delete the folder of this process."""
        shutil.rmtree(self.path, ignore_errors=True)

    def remove(self) -> None:
        """Delete the folder of this process, and the run's folder if no process uses it any more."""
        self.clear()
        with suppress(OSError):
            self.path.parent.rmdir()

    def _create(self, root: str) -> tuple[str, int]:
        try:
            return self._empty()
        except OSError as error:
            raise CheckpointError(
                f"checkpoint.local_dir={root}: cannot be written ({error.strerror}). "
                "Set it to a folder on a local disk of each node, or to null."
            ) from None

    def _empty(self) -> tuple[str, int]:
        """Create an empty folder, and return its disk as (host, device number)."""
        self.clear()
        self.path.mkdir(parents=True)
        return socket.gethostname(), self.path.stat().st_dev


def _copy(source: Path, target: Path) -> str:
    """Copy a file and return the checksum of the bytes that were read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with open(source, "rb") as reader, open(target, "wb") as writer:
        while block := reader.read(COPY_BLOCK_BYTES):
            digest.update(block)
            writer.write(block)
    return digest.hexdigest()
