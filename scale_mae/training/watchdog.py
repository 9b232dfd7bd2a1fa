"""The watchdog: a process that makes no progress prints its stacks and exits, so that the job can restart."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from types import TracebackType

EXIT_CODE = 70
GRACE_SECONDS = 10.0  # between the report of a process and its exit, so that the other processes can report as well


class Watchdog:
    """Ends this process if :meth:`report_progress` is not called for a given time. It starts at the first call.

    A thread writes the stacks of all threads to standard error. If the interpreter itself hangs, so that no thread runs,
    the timer of :mod:`faulthandler` writes them a little later.

    Args:
        minutes: The longest time without progress. 0 disables the watchdog.
        rank: The rank to print.
    """

    def __init__(self, minutes: float, rank: int) -> None:
        self.limit_seconds, self.rank = 60 * minutes, rank
        self._last_progress: float | None = None
        self._closed = threading.Event()

    def __enter__(self) -> Watchdog:
        if self.limit_seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        if self._last_progress is not None:
            faulthandler.cancel_dump_traceback_later()

    def report_progress(self) -> None:
        """Report that a step, a checkpoint or a part of an evaluation is done."""
        if self.limit_seconds:
            self._last_progress = time.monotonic()
            faulthandler.dump_traceback_later(self.limit_seconds + 3 * GRACE_SECONDS, exit=True)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.limit_seconds / 4)):
            last_progress = self._last_progress
            if last_progress is not None and time.monotonic() - last_progress > self.limit_seconds:
                self._print_stacks()
                time.sleep(GRACE_SECONDS)
                if self._last_progress == last_progress and not self._closed.is_set():  # else it was only slow
                    os._exit(EXIT_CODE)

    def _print_stacks(self) -> None:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        lines = [
            f"no progress for {self.limit_seconds / 60:g} minutes (run.watchdog_minutes); exiting in {GRACE_SECONDS:g} s; "
            "stacks of all threads:"
        ]
        for ident, frame in sys._current_frames().items():
            if ident != threading.get_ident():
                lines.append(f"thread {names.get(ident, ident)}, most recent call last:")
                lines += "".join(traceback.format_stack(frame)).splitlines()
        text = "".join(f"rank {self.rank} | {line}\n" for line in lines)
        # not through sys.stderr, whose lock another thread may hold
        os.write(sys.stderr.fileno(), text.encode(errors="replace"))
