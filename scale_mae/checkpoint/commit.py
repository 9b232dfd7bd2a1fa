"""Commits a checkpoint atomically, so that a reader finds a complete checkpoint or none.

    1  Every process writes its files to a hidden staging folder in ``checkpoints/``.
    2  Every process flushes its files to the disk and computes their checksums.
    3  Rank 0 writes the manifest, flushes the folder, and renames it to ``step-...``. This is the commit.
    4  Rank 0 updates the ``latest`` pointer and deletes old checkpoints. A failure here loses nothing.

A barrier separates the phases.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scale_mae.checkpoint.discovery import rename_as_damaged
from scale_mae.checkpoint.errors import CheckpointError, convert_os_errors
from scale_mae.checkpoint.manifest import Manifest, read_manifest
from scale_mae.checkpoint.paths import CHECKPOINTS_FOLDER, MANIFEST_FILE, STEP_PREFIX, format_checkpoint_name, list_checkpoints
from scale_mae.checkpoint.retention import delete_old_checkpoints
from scale_mae.config import Config
from scale_mae.distributed.process_group import World
from scale_mae.system.files import check_space, flush, sha256
from scale_mae.system.versions import package_versions

# Writes this process's files to a folder. Returns the checksum that each file must have, or None if it is not known.
WriteFiles = Callable[[Path], Mapping[Path, str | None]]


class Committer:
    """Commits the checkpoints of a run. All processes create one and call :meth:`commit` together.

    Args:
        run_dir: Run directory.
        config: The configuration, which is stored in each checkpoint.
        zero_stage: ZeRO stage.
        max_bytes: Upper bound of the size of a checkpoint in bytes.
        keep_interval: ``checkpoint.keep_interval`` in steps.
    """

    def __init__(self, run_dir: Path, config: Config, zero_stage: int, max_bytes: int, keep_interval: int | None) -> None:
        self.run_dir, self.config, self.zero_stage = run_dir, config, zero_stage
        self.max_bytes, self.keep_interval = max_bytes, keep_interval

    def path(self, step: int) -> Path:
        """Return the path of the checkpoint of a step."""
        return self.run_dir / CHECKPOINTS_FOLDER / format_checkpoint_name(step)

    def commit(self, world: World, step: int, write: WriteFiles, *, keep_all: bool) -> tuple[int, list[str]]:
        """Write the checkpoint of a step and commit it.

        Args:
            world: The process group. A background thread needs a control group of its own.
            step: The step.
            write: Writes the files of this process.
            keep_all: Do not delete old checkpoints.

        Returns:
            The size of the checkpoint in bytes, and messages about failures after the commit.

        Raises:
            CheckpointError: The checkpoint could not be written. It is raised on all processes.
        """
        final = self.path(step)
        staging = final.with_name(f".{final.name}.tmp")
        try:
            world.run_on_main(lambda: convert_os_errors(lambda: self._create_staging(staging), final))
            written = dict(world.run_on_all(lambda: convert_os_errors(lambda: write(staging), final)))
            if world.is_main:
                written[staging / "config.yaml"] = None
            own_entries = world.run_on_all(lambda: convert_os_errors(lambda: _build_entries(written, staging), final))
            entries = {name: entry for part in world.all_gather(own_entries) for name, entry in part.items()}
            manifest = Manifest(step, world.size, self.zero_stage, self.config.digest(), package_versions(), entries)
            world.run_on_main(lambda: convert_os_errors(lambda: _rename_staging(manifest, staging, final), final))
        except CheckpointError:
            if world.is_main:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        messages = self._finish(final, keep_all) if world.is_main else []
        return sum(entry["bytes"] for entry in entries.values()), messages

    def _create_staging(self, staging: Path) -> None:
        """Delete leftovers of killed processes, check the free space, and create the staging folder."""
        staging.parent.mkdir(parents=True, exist_ok=True)
        flush(staging.parent.parent)  # makes the new folder's name durable
        for leftover in staging.parent.glob(f".{STEP_PREFIX}*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        check_space(staging.parent, self._expected_bytes())
        staging.mkdir()
        (staging / "config.yaml").write_text(self.config.to_yaml())

    def _expected_bytes(self) -> int:
        """Return the size of the latest checkpoint with a valid manifest, or the upper bound if there is none."""
        for checkpoint in reversed(list_checkpoints(self.run_dir)):
            try:
                return sum(int(entry["bytes"]) for entry in read_manifest(checkpoint).files.values())
            except (CheckpointError, KeyError, TypeError, ValueError):
                continue
        return self.max_bytes

    def _finish(self, checkpoint: Path, keep_all: bool) -> list[str]:
        """Update the ``latest`` pointer and delete old checkpoints. Return messages about what failed."""
        messages = []
        try:
            _update_latest(checkpoint)
        except OSError as error:
            messages.append(
                f"{checkpoint.with_name('latest')}: not updated ({error.strerror}). scale_mae does not read this file."
            )
        try:
            if not keep_all:
                delete_old_checkpoints(self.run_dir, checkpoint, self.config.checkpoint.keep_latest, self.keep_interval)
        except OSError as error:
            messages.append(f"{checkpoint.parent}: old checkpoints were not deleted ({error.strerror}).")
        return messages


def _build_entries(written: Mapping[Path, str | None], staging: Path) -> dict[str, dict[str, Any]]:
    """Flush files and return their manifest entries, by path inside the checkpoint."""
    entries = {}
    for path, expected_checksum in written.items():
        flush(path)
        checksum = sha256(path)
        if expected_checksum not in (None, checksum):
            raise OSError(f"{path}: differs from the file that it was copied from")
        entries[str(path.relative_to(staging))] = {"bytes": path.stat().st_size, "sha256": checksum}
    return entries


def _rename_staging(manifest: Manifest, staging: Path, final: Path) -> None:
    """Commit: write the manifest, flush everything, and give the staging folder its final name."""
    (staging / MANIFEST_FILE).write_text(manifest.to_json())
    flush(staging / MANIFEST_FILE)
    for folder in (*(path for path in staging.rglob("*") if path.is_dir()), staging):
        flush(folder)
    if final.exists():  # a damaged checkpoint that could not be renamed when the run resumed
        rename_as_damaged(final)
    staging.rename(final)
    flush(final.parent)


def _update_latest(checkpoint: Path) -> None:
    """Write the name of a checkpoint to ``latest``."""
    pointer, staging = checkpoint.with_name("latest"), checkpoint.with_name("latest.tmp")
    for path in (pointer, staging):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()  # fails if the folder is not empty
    staging.write_text(checkpoint.name)
    flush(staging)
    staging.rename(pointer)
    flush(pointer.parent)
