"""Verification of checkpoints: every file must have the size and the checksum that the manifest states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.checkpoint.manifest import Manifest, read_manifest
from scale_mae.system.files import sha256
from scale_mae.system.resources import available_cores
from scale_mae.system.thread_pool import DaemonThreadPool


class Verification:
    """A running verification of a checkpoint.

    Threads start to compute the checksums at construction. They do not delay the exit of the process.

    Attributes:
        checkpoint: The checkpoint.
        messages: Messages from the search for the checkpoint, one for each damaged one that was skipped.

    Raises:
        CheckpointError: The manifest is missing or damaged.
    """

    def __init__(self, checkpoint: Path, messages: Sequence[str] = ()) -> None:
        self.checkpoint, self.messages, self._manifest = checkpoint, list(messages), read_manifest(checkpoint)
        threads, files = DaemonThreadPool(available_cores(), "checksum"), self._manifest.files
        self._checks = [threads.submit(_verify_file, checkpoint / name, entry, True) for name, entry in files.items()]
        threads.shutdown()

    def result(self) -> Manifest:
        """Wait for the checksums and return the manifest.

        Raises:
            CheckpointError: A file is missing or damaged. The message names the first such file.
        """
        for check in self._checks:
            check.result()
        return self._manifest

    def failed(self) -> bool:
        """Wait for the checksums and return whether a file is missing or damaged."""
        try:
            self.result()
        except CheckpointError:
            return True
        return False


def verify(checkpoint: Path, *, checksums: bool = True) -> Manifest:
    """Verify all files of a checkpoint and return its manifest.

    Args:
        checkpoint: The folder of the checkpoint.
        checksums: Compare checksums. ``False`` compares sizes only, which is fast.

    Raises:
        CheckpointError: A file is missing or damaged. The message names the first such file.
    """
    if checksums:
        return Verification(checkpoint).result()
    manifest = read_manifest(checkpoint)
    for name, entry in manifest.files.items():
        _verify_file(checkpoint / name, entry, checksums=False)
    return manifest


def _verify_file(path: Path, entry: dict[str, Any], checksums: bool) -> None:
    """Compare a file with its entry in the manifest."""
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{path}: damaged (it has {size} bytes, but {entry['bytes']} bytes were written)")
        is_intact = not checksums or sha256(path) == entry["sha256"]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing from the checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not is_intact:
        raise CheckpointError(f"{path}: damaged (its checksum differs from the manifest)")
