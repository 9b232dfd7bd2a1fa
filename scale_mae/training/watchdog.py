"""Progress, not liveness: a process that takes no step says where it stands and ends, so that its job can start again."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from types import TracebackType

EXIT_CODE = 70
GRACE = 10.0  # seconds between what a process says and its end, so that the others, whose time is up too, can speak


class Watchdog:
    """Ends this process when :meth:`beat` has not been called for a while. It sleeps until the first beat.

    A thread writes the stack of every thread to standard error. Should the interpreter itself be stuck, so that no thread
    runs, the system's own timer does it a little later.

    Args:
        minutes: between beats; 0: never.
        rank: named in what it says.
    """

    def __init__(self, minutes: float, rank: int) -> None:
        self.limit, self.rank = 60 * minutes, rank
        self._last: float | None = None
        self._over = threading.Event()

    def __enter__(self) -> Watchdog:
        if self.limit:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        if self._last is not None:
            faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """There is progress: a step, or a checkpoint."""
        if self.limit:
            self._last = time.monotonic()
            faulthandler.dump_traceback_later(self.limit + 3 * GRACE, exit=True)

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.limit / 4)):
            if self._last is not None and time.monotonic() - self._last > self.limit:
                last = self._last
                self._tell()
                time.sleep(GRACE)
                if self._last == last and not self._over.is_set():  # else it was slow, not stuck
                    os._exit(EXIT_CODE)

    def _tell(self) -> None:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        lines = [f"no progress for {self.limit / 60:g} minutes (run.watchdog_minutes); the end in {GRACE:g} s; all threads:"]
        for ident, frame in sys._current_frames().items():
            if ident != threading.get_ident():
                lines.append(f"thread {names.get(ident, ident)}, innermost call last:")
                lines += "".join(traceback.format_stack(frame)).splitlines()
        text = "".join(f"rank {self.rank} | {line}\n" for line in lines)
        os.write(sys.stderr.fileno(), text.encode(errors="replace"))  # at once, whatever holds Python's own stream
