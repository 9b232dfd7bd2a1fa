"""A pool of daemon threads: a thread that hangs in a read does not keep the process alive."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any


class DaemonThreadPool:
    """A pool of threads like ``concurrent.futures.ThreadPoolExecutor``, but the process can exit while a thread hangs.

    Args:
        count: Number of threads.
        name: Prefix of the thread names.
    """

    def __init__(self, count: int, name: str) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()
        self._count, self._cancelled = count, False
        for number in range(count):
            threading.Thread(target=self._work, name=f"{name}_{number}", daemon=True).start()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Call ``function(*args)`` in a thread. The future is cancelled if the pool cancels its tasks."""
        future: Future[Any] = Future()
        self._tasks.put((future, function, args))
        if self._cancelled:
            self._cancel_pending()
        return future

    def shutdown(self, *, cancel_futures: bool = False) -> None:
        """Let the threads end after the submitted tasks. This call does not wait for them.

        Args:
            cancel_futures: Cancel the tasks that have not started.
        """
        if cancel_futures:
            self._cancelled = True
            self._cancel_pending()
        else:
            for _ in range(self._count):
                self._tasks.put(None)

    def _cancel_pending(self) -> None:
        try:
            while True:
                if task := self._tasks.get_nowait():
                    task[0].cancel()
        except Empty:
            self.shutdown()

    def _work(self) -> None:
        while task := self._tasks.get():
            future, function, args = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*args))
                except BaseException as error:
                    future.set_exception(error)


def run_in_new_thread(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Call ``function(*args)`` in a new daemon thread, for when all threads of a pool may be blocked."""
    pool = DaemonThreadPool(1, "retry")
    future = pool.submit(function, *args)
    pool.shutdown()
    return future
