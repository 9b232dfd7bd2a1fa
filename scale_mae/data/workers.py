"""Worker processes that share memory with the one that starts them, and threads that storage may keep waiting for ever."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, closing
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
IDLE = 30.0  # seconds
PR_SET_PDEATHSIG = 1
_shared: Any = None  # of a worker process


def start_workers(shared: Any, count: int) -> ProcessPoolExecutor:
    """A pool of processes in which :func:`shared` gives ``shared``, not a copy: maps made writable are written through.

    They are forked, so that the caller's main program is not imported again as by a spawned process; their tasks must
    keep to files, numpy and Pillow. They end with their parent, however it ends.
    """
    return ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _start, (shared,))


def run_each(
    shared: Any, count: int, action: Callable[[Any], T], arguments: Iterable[Any], at_once: int, idle: Callable[[], None]
) -> AbstractContextManager[Iterator[T]]:
    """Results of ``action`` for each argument as they come from ``count`` workers, with at most ``at_once`` under way.

    To be used in a ``with`` statement: when it is left early, by an interrupt for instance, the processes are ended where
    they are. ``idle`` is called whenever nothing came for half a minute.

    Raises:
        BrokenProcessPool: a worker died.
    """
    return closing(_run_each(shared, count, action, iter(arguments), at_once, idle))


def _run_each(
    shared: Any, count: int, action: Callable[[Any], T], arguments: Iterator[Any], at_once: int, idle: Callable[[], None]
) -> Generator[T, None, None]:
    running: set[Future[T]] = set()
    with start_workers(shared, count) as pool:
        try:
            while True:
                for argument in islice(arguments, at_once - len(running)):
                    running.add(pool.submit(action, argument))
                if not running:
                    return
                ready, running = wait(running, IDLE, FIRST_COMPLETED)
                if not ready:
                    idle()
                for future in ready:
                    yield future.result()
        except BaseException:
            for process in list((pool._processes or {}).values()):  # there is no public way before Python 3.14
                process.kill()
            raise


def shared() -> Any:
    """What :func:`start_workers` was given."""
    return _shared


def _start(given: Any) -> None:
    global _shared
    _shared = given
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Slurm signals every process of a job; the parent decides
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # an orphan would hold on to the locks of its parent


class DaemonThreadPool:
    """A pool of threads like concurrent.futures' own, except that a thread which hangs in a read does not keep the process
    from ending."""

    def __init__(self, count: int, name: str) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()
        self._count, self._closed = count, False
        for number in range(count):
            threading.Thread(target=self._work, name=f"{name}_{number}", daemon=True).start()

    def submit(self, action: Callable[..., Any], *args: Any) -> Future[Any]:
        """Call ``action(*args)`` in a thread; after :meth:`close` the future is cancelled."""
        future: Future[Any] = Future()
        self._tasks.put((future, action, args))
        if self._closed:
            self._drop()
        return future

    def finish(self) -> None:
        """The threads end when they have done what was submitted."""
        for _ in range(self._count):
            self._tasks.put(None)

    def close(self) -> None:
        """Cancel what has not begun; the threads end when they are done with what has."""
        self._closed = True
        self._drop()

    def _drop(self) -> None:
        try:
            while True:
                if task := self._tasks.get_nowait():
                    task[0].cancel()
        except Empty:
            self.finish()

    def _work(self) -> None:
        while task := self._tasks.get():
            future, action, args = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(action(*args))
                except BaseException as error:
                    future.set_exception(error)
