"""Run an action with a time limit, so that a device or file system that hangs does not hang the preflight."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
_hanging_threads: list[threading.Thread] = []


@dataclass(frozen=True)
class Result(Generic[T]):
    """The result of an action, or the reason for which it has none.

    Attributes:
        value: What the action returned. ``None`` if it failed.
        error: One line about the failure. Empty if the action succeeded.
    """

    value: T | None
    error: str = ""


def run_with_timeout(seconds: float, action: Callable[[], T]) -> Result[T]:
    """Run an action in a thread and wait for a limited time. A thread that hangs is abandoned and ends with the process."""
    results: queue.Queue[Result[T]] = queue.Queue()

    def run() -> None:
        try:
            results.put(Result(action()))
        except Exception as error:  # a broken device or file system may raise anything, and the caller reports it
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            results.put(Result(None, (reason.strip().splitlines() or [""])[0] or type(error).__name__))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        return results.get(timeout=seconds)
    except queue.Empty:
        _hanging_threads.append(thread)
        return Result(None, f"did not finish in {seconds:g} s")


def has_hanging_actions() -> bool:
    """Return whether an abandoned action still runs. A normal exit of the interpreter could then hang as well."""
    return any(thread.is_alive() for thread in _hanging_threads)
