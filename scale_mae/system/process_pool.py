"""Worker processes that share memory with the process that starts them."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, closing
from itertools import islice
from typing import Any, TypeVar

T = TypeVar("T")
IDLE_SECONDS = 30.0
PR_SET_PDEATHSIG = 1
_state: Any = None  # of a worker process


def start_process_pool(state: Any, processes: int) -> ProcessPoolExecutor:
    """Start worker processes in which :func:`shared_state` returns ``state``.

    The workers are forked. They see ``state`` itself, so writes to a shared memory map reach the parent. The main program is
    not imported again. Tasks must use files, numpy and Pillow only. The workers die with their parent.
    """
    return ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _start_worker, (state,))


def map_unordered(
    function: Callable[[Any], T],
    arguments: Iterable[Any],
    *,
    processes: int,
    max_pending: int,
    state: Any = None,
    on_idle: Callable[[], None] = lambda: None,
) -> AbstractContextManager[Iterator[T]]:
    """Call ``function`` with each argument in worker processes and yield the results as they arrive.

    Use it in a ``with`` statement: leaving the block early, on an interrupt for example, kills the workers.

    Args:
        function: A function of a module; it runs in a worker.
        arguments: The arguments, drawn as workers become free.
        processes: Number of workers.
        max_pending: Number of submitted calls at any time.
        state: See :func:`start_process_pool`.
        on_idle: Called after every 30 seconds without a result.

    Raises:
        BrokenProcessPool: A worker died.
    """
    return closing(_map_unordered(function, iter(arguments), processes, max_pending, state, on_idle))


def _map_unordered(
    function: Callable[[Any], T],
    arguments: Iterator[Any],
    processes: int,
    max_pending: int,
    state: Any,
    on_idle: Callable[[], None],
) -> Generator[T, None, None]:
    pending: set[Future[T]] = set()
    with start_process_pool(state, processes) as pool:
        try:
            while True:
                for argument in islice(arguments, max_pending - len(pending)):
                    pending.add(pool.submit(function, argument))
                if not pending:
                    return
                done, pending = wait(pending, IDLE_SECONDS, FIRST_COMPLETED)
                if not done:
                    on_idle()
                for future in done:
                    yield future.result()
        except BaseException:
            for process in list((pool._processes or {}).values()):  # Python has no public way before 3.14
                process.kill()
            raise


def shared_state() -> Any:
    """Return the ``state`` of :func:`start_process_pool` in a worker process."""
    return _state


def _start_worker(state: Any) -> None:
    global _state
    _state = state
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Slurm signals every process of a job; only the parent reacts
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # an orphan would keep its parent's locks
