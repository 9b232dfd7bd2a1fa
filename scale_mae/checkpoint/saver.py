"""Saves checkpoints during training, directly to the run directory or first to a node-local disk.

:mod:`scale_mae.checkpoint.commit` makes each save atomic. Without a node-local disk, training waits for the whole commit. With
a node-local disk, training waits only for the local write, and a thread does the rest. See
:mod:`scale_mae.checkpoint.node_local_staging`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from scale_mae.checkpoint.commit import Committer, WriteFiles
from scale_mae.checkpoint.errors import CheckpointError, convert_os_errors
from scale_mae.checkpoint.node_local_staging import LocalStaging
from scale_mae.config import Config, UserError
from scale_mae.distributed.process_group import World


@dataclass(frozen=True)
class SaveResult:
    """The result of a save.

    Attributes:
        step: Step of the checkpoint.
        path: The checkpoint. ``None`` if the save failed.
        error: Why the save failed. ``None`` if it succeeded.
        seconds: Seconds from the start of the save to its commit or failure.
        blocked_seconds: The part of ``seconds`` for which training was blocked.
        nbytes: Size of the checkpoint in bytes. 0 if the save failed.
        messages: Messages about failures after the commit, such as an old checkpoint that could not be deleted.
    """

    step: int
    path: Path | None = None
    error: CheckpointError | None = None
    seconds: float = 0.0
    blocked_seconds: float = 0.0
    nbytes: int = 0
    messages: tuple[str, ...] = ()


class Saver:
    """Saves the checkpoints of a run. All processes create one and call the same methods at the same steps.

    Use it as a context manager. At the end, or after a :class:`UserError`, it waits for the save in progress.

    Args:
        run_dir: Run directory.
        config: The configuration. It is stored in each checkpoint.
        world: The process group.
        zero_stage: ZeRO stage.
        max_bytes: Upper bound of the size of a checkpoint in bytes.
        main_only_bytes: The part of ``max_bytes`` that only rank 0 writes.
        keep_interval: ``checkpoint.keep_interval`` in steps.
        failures: Number of failed saves before this process started.

    Attributes:
        error: Why the last save failed. ``None`` if it succeeded.
        failures: Number of failed saves of the run.

    Raises:
        CheckpointError: ``checkpoint.local_dir`` cannot be used.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        world: World,
        *,
        zero_stage: int,
        max_bytes: int,
        main_only_bytes: int,
        keep_interval: int | None = None,
        failures: int = 0,
    ) -> None:
        self._world, self._max_bytes, self._main_only_bytes = world, max_bytes, main_only_bytes
        self._committer = Committer(run_dir, config, zero_stage, max_bytes, keep_interval)
        self.failures = failures
        self.error: CheckpointError | None = None
        self._results: queue.SimpleQueue[SaveResult] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._local: LocalStaging | None = None
        if config.checkpoint.local_dir:
            self._local = LocalStaging(config.checkpoint.local_dir, run_dir, world)
            self._thread_world = world.with_new_control_group()

    def save(self, step: int, write: Callable[[Path], list[Path]], *, keep_all: bool = False) -> None:
        """Save a checkpoint. :meth:`take_results` returns the result when the save has ended.

        Args:
            step: Step of the checkpoint.
            write: Writes this process's files to a folder and returns their paths.
            keep_all: Do not delete old checkpoints.
        """
        self.wait()  # one save at a time
        start, local = time.perf_counter(), self._local
        if local is None:
            result = self._commit(self._world, step, lambda folder: dict.fromkeys(write(folder)), keep_all)
            self._end_save(result, start)
            return
        try:
            files = self._write_locally(local, step, write)
        except CheckpointError as error:
            local.clear()  # incomplete files would only fill the disk
            self._end_save(SaveResult(step, error=error), start)
            return
        blocked_seconds = time.perf_counter() - start
        arguments = (local, step, files, keep_all, start, blocked_seconds)
        self._thread = threading.Thread(target=self._copy_and_commit, args=arguments, daemon=True)
        self._thread.start()

    def take_results(self) -> list[SaveResult]:
        """Return the results of the saves that have ended on this process since the last call."""
        return [self._results.get() for _ in range(self._results.qsize())]

    def wait(self) -> None:
        """Wait for the save in progress."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # after another error, a process may have ended, and this would wait forever
        if kind is None or issubclass(kind, UserError):
            self.wait()
            if self._local:
                self._local.remove()

    def _write_locally(self, local: LocalStaging, step: int, write: Callable[[Path], list[Path]]) -> list[Path]:
        """Write this process's files to the local disk."""
        checkpoint = self._committer.path(step)
        # ``write`` has barriers, so it must not start before every process is prepared
        local.prepare(checkpoint, self._max_bytes, self._main_only_bytes)
        return self._world.run_on_all(lambda: convert_os_errors(lambda: write(local.path), checkpoint, local.path))

    def _copy_and_commit(
        self, local: LocalStaging, step: int, files: list[Path], keep_all: bool, start: float, blocked_seconds: float
    ) -> None:
        """Copy this process's files from the local disk to the run directory and commit them. A thread runs this."""
        try:
            result = self._commit(self._thread_world, step, lambda folder: local.copy(files, folder), keep_all)
        except Exception as error:  # nothing would report an error that leaves the thread
            failure = CheckpointError(
                f"{self._committer.path(step)}: not copied from {local.path} ({error}). Earlier checkpoints are not affected."
            )
            result = SaveResult(step, error=failure)
        local.clear()
        self._end_save(result, start, blocked_seconds)

    def _commit(self, world: World, step: int, write: WriteFiles, keep_all: bool) -> SaveResult:
        """Commit a checkpoint. :meth:`_end_save` adds the durations to the result."""
        try:
            nbytes, messages = self._committer.commit(world, step, write, keep_all=keep_all)
        except CheckpointError as error:
            return SaveResult(step, error=error)
        return SaveResult(step, path=self._committer.path(step), nbytes=nbytes, messages=tuple(messages))

    def _end_save(self, result: SaveResult, start: float, blocked_seconds: float | None = None) -> None:
        """Record a result. ``blocked_seconds=None`` means that training was blocked all the time."""
        seconds = time.perf_counter() - start
        self.error = result.error
        self.failures += result.path is None
        blocked_seconds = seconds if blocked_seconds is None else blocked_seconds
        self._results.put(replace(result, seconds=seconds, blocked_seconds=blocked_seconds))
