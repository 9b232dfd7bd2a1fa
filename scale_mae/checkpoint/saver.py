"""Checkpoints are committed: written aside, flushed, sealed by checksums, and only then given their name.

    1  every process writes its files, to a hidden folder beside the checkpoints, or first to its node's own disk
    2  every process flushes its files and takes their checksums
    3  the first process writes the manifest, flushes the folder, renames it
    4  it renames the ``latest`` pointer and deletes what is no longer kept; failing here loses nothing

Each step begins when all processes are through with the one before. With a node-local folder only the local write holds up
training; a thread does the rest.
"""

from __future__ import annotations

import hashlib
import queue
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from scale_mae.checkpoint.local_staging import LocalFolder, lost
from scale_mae.checkpoint.retention import retained
from scale_mae.checkpoint.store import (
    FOLDER,
    MANIFEST,
    PREFIX,
    CheckpointError,
    Manifest,
    checkpoint_name,
    checkpoints,
    move_aside,
    read_manifest,
    step_of,
)
from scale_mae.config import Config, UserError
from scale_mae.distributed.process_group import World
from scale_mae.system.files import check_space, flush, sha256
from scale_mae.system.versions import package_versions

Write = Callable[[Path], list[Path]]
BLOCK = 1 << 22  # bytes copied at once


@dataclass(frozen=True)
class SaveResult:
    """How a save ended.

    Attributes:
        path: the checkpoint; None when it was lost.
        error: why it was lost.
        seconds: from its beginning until it had its name, or was lost.
        stalled: of these, how long training stood still.
        notes: what else went wrong.
        nbytes: size of the checkpoint.
        step: of the schedule.
    """

    path: Path | None
    error: CheckpointError | None
    seconds: float
    stalled: float
    notes: tuple[str, ...] = ()
    nbytes: int = 0
    step: int = 0


class Saver:
    """Writes the checkpoints of a run. All processes make one, and call the same methods at the same steps.

    A context: left in order or by a :class:`UserError`, it first finishes what is under way.

    Args:
        run_dir: the run directory.
        config: stored in each checkpoint; ``checkpoint`` says how many are kept, and whether a local folder comes first.
        world: the processes.
        zero_stage: of DeepSpeed.
        nbytes: what a checkpoint takes at most.
        alone: of these, what the first process alone writes.
        keep_every: ``checkpoint.keep_interval`` in steps.
        failures: saves that were lost before this process began; goes on counting.

    Attributes:
        error: why the save that ended last was lost; None when it was not.

    Raises:
        CheckpointError: the local folder cannot be used.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        world: World,
        *,
        zero_stage: int,
        nbytes: int,
        main_only_nbytes: int,
        keep_every: int | None = None,
        failures: int = 0,
    ) -> None:
        self.config, self.world, self.zero_stage, self.keep_every = config, world, zero_stage, keep_every
        self.nbytes, self.main_only_nbytes = nbytes, main_only_nbytes
        self.folder, self.failures = run_dir / FOLDER, failures
        self.error: CheckpointError | None = None
        self._ended: queue.SimpleQueue[SaveResult] = queue.SimpleQueue()
        self._publishing: threading.Thread | None = None
        # of the save under way
        self._notes: list[str] = []
        self._keep_all = False
        self._sources: dict[Path, str] = {}  # checksums of what was copied
        self._step = self._written = 0  # bytes
        self._local: LocalFolder | None = None
        if config.checkpoint.local_dir:
            self._local = LocalFolder(config.checkpoint.local_dir, run_dir, world)
            self._behind = world.with_new_control_group()

    def save(self, step: int, write: Write, *, keep_all: bool = False) -> None:
        """Write a checkpoint; see :meth:`ended`.

        Args:
            step: its step.
            write: puts this process's files into a folder and names them.
            keep_all: delete no older one for it.
        """
        self.drain()  # one at a time
        self._step, self._keep_all = step, keep_all
        began = time.perf_counter()
        path, error, written, local = None, None, [], self._local
        try:
            if local is None:
                path = self._commit(self.world, step, write)
            else:
                # rounds of their own: who cannot even begin must not be missed in the barriers of ``write``
                final = self.folder / checkpoint_name(step)
                local.prepare(final, self.nbytes, self.main_only_nbytes)
                written = self.world.run_on_all(lambda: lost(lambda: write(local.path), final, local.path))
        except CheckpointError as loss:
            error = loss
            if local:
                local.clear()  # a part of it would only fill the disk
        stalled = time.perf_counter() - began
        if path or error:
            self._end(SaveResult(path, error, stalled, stalled))
        else:
            self._publishing = threading.Thread(target=self._publish, args=(step, written, began, stalled), daemon=True)
            self._publishing.start()

    def ended(self) -> list[SaveResult]:
        """Saves that have ended since the last call, on this process."""
        return [self._ended.get() for _ in range(self._ended.qsize())]

    def drain(self) -> None:
        """Wait for the save under way."""
        if self._publishing:
            self._publishing.join()
            self._publishing = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None or issubclass(kind, UserError):  # others may mean that a process is gone, and nobody to wait for
            self.drain()
            if self._local:
                self._local.remove()

    def _publish(self, step: int, written: list[Path], began: float, stalled: float) -> None:
        local = self._local
        assert local

        def bring(staging: Path) -> list[Path]:
            self._sources = {
                staging / p.relative_to(local.path): _copy(p, staging / p.relative_to(local.path)) for p in written
            }
            return list(self._sources)

        try:
            path, error = self._commit(self._behind, step, bring), None
        except CheckpointError as loss:
            path, error = None, loss
        except Exception as trouble:  # in a thread of its own nobody would hear of it
            path, error = None, CheckpointError(f"{self.folder / checkpoint_name(step)}: not published ({trouble})")
        local.clear()
        self._end(SaveResult(path, error, time.perf_counter() - began, stalled))

    def _end(self, saved: SaveResult) -> None:
        self.error = saved.error
        self.failures += saved.path is None
        self._ended.put(replace(saved, notes=tuple(self._notes), nbytes=self._written, step=self._step))
        self._notes.clear()

    def _commit(self, world: World, step: int, write: Write) -> Path:
        """The four steps of this module's text."""
        final = self.folder / checkpoint_name(step)
        staging = final.with_name(f".{final.name}.tmp")
        try:
            world.run_on_main(lambda: lost(lambda: self._prepare(staging), final))
            written = world.run_on_all(lambda: lost(lambda: write(staging), final))
            mine = written + ([staging / "config.yaml"] if world.is_main else [])
            sums = world.run_on_all(lambda: lost(lambda: self._sums(mine, staging), final))
            files = {name: facts for part in world.all_gather(sums) for name, facts in part.items()}
            self._written = sum(facts["bytes"] for facts in files.values())
            manifest = Manifest(step, world.size, self.zero_stage, self.config.digest(), package_versions(), files)
            world.run_on_main(lambda: lost(lambda: self._name(manifest, staging, final), final))
        except CheckpointError:
            if world.is_main:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        if world.is_main:
            self._after(final)
        return final

    def _sums(self, mine: list[Path], staging: Path) -> dict[str, Any]:
        return {str(p.relative_to(staging)): _seal(p, self._sources.get(p)) for p in mine}

    def _prepare(self, staging: Path) -> None:
        staging.parent.mkdir(parents=True, exist_ok=True)
        flush(staging.parent.parent)  # the folder's own name
        for left_over in staging.parent.glob(f".{PREFIX}*.tmp"):
            shutil.rmtree(left_over, ignore_errors=True)
        check_space(staging.parent, self._size())
        staging.mkdir()
        (staging / "config.yaml").write_text(self.config.to_yaml())

    def _size(self) -> int:
        """Bytes of the next checkpoint: as many as the last one has, or what was reckoned."""
        for checkpoint in reversed(checkpoints(self.folder.parent)):
            try:
                return sum(int(facts["bytes"]) for facts in read_manifest(checkpoint).files.values())
            except (CheckpointError, KeyError, TypeError, ValueError):
                continue
        return self.nbytes

    def _name(self, manifest: Manifest, staging: Path, final: Path) -> None:
        (staging / MANIFEST).write_text(manifest.to_text())
        flush(staging / MANIFEST)
        for folder in (*(p for p in staging.rglob("*") if p.is_dir()), staging):
            flush(folder)
        if final.exists():  # found damaged when the run was resumed, and could not be moved then
            move_aside(final)
        staging.rename(final)
        flush(final.parent)

    def _after(self, newest: Path) -> None:
        """Point to the newest, delete what is no longer kept. The checkpoint has its name: nothing here can lose it."""
        pointer, staging = newest.with_name("latest"), newest.with_name("latest.tmp")
        try:
            for path in (pointer, staging):
                if path.is_dir() and not path.is_symlink():
                    path.rmdir()  # only an empty one
            staging.write_text(newest.name)
            flush(staging)
            staging.rename(pointer)
            flush(pointer.parent)
        except OSError as error:
            self._notes.append(f"{pointer}: not renewed ({error.strerror}); nothing relies on it")
        try:
            if not self._keep_all:
                self._prune(newest)
        except OSError as error:
            self._notes.append(f"{newest.parent}: older checkpoints are not deleted ({error.strerror})")

    def _prune(self, newest: Path) -> None:
        """Delete what is no longer kept. The newest is whole by now; one that is newer by name is from before a resume."""
        older = {step_of(c): c for c in checkpoints(newest.parent.parent) if c.name <= newest.name}
        kept = retained(list(older), self.config.checkpoint.keep_latest, self.keep_every)
        for step in older.keys() - kept:
            hidden = older[step].with_name(f".{older[step].name}.tmp")  # a name first: half of one must not look like one
            try:
                older[step].rename(hidden)
                shutil.rmtree(hidden)
            except OSError:
                continue  # tried again after the next save


def _copy(path: Path, out: Path) -> str:
    """Copy a file; the checksum of what was read."""
    out.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with open(path, "rb") as reading, open(out, "wb") as writing:
        while block := reading.read(BLOCK):
            digest.update(block)
            writing.write(block)
    return digest.hexdigest()


def _seal(path: Path, source: str | None) -> dict[str, Any]:
    """Flush a file and take its checksum, which is to be that of its source, if it has one."""
    flush(path)
    digest = sha256(path)
    if source not in (None, digest):
        raise OSError(f"{path} differs from what was copied")
    return {"bytes": path.stat().st_size, "sha256": digest}
