"""Progress of a long command: a bar with rate and remaining time on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """Shows the progress of countable work on standard error.

    Args:
        what: The counted things, such as ``images``.
        shown: Whether to show anything. Of several processes, only one should.
    """

    def __init__(self, what: str, *, shown: bool = True) -> None:
        self._what, self._printed_at = what, 0.0
        columns = (
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self._shown = shown
        self._progress = Progress(*columns, console=Console(stderr=True)) if shown and sys.stderr.isatty() else None
        self._started_at, self._first_done, self._last_done, self._total = 0.0, 0, 0, -1

    def __enter__(self) -> ProgressBar:
        if self._progress:
            self._task = self._progress.add_task(self._what, total=None)
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress:
            self._progress.stop()

    def update(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` things are done. A smaller ``done`` or another ``total`` starts a new measurement."""
        now = time.monotonic()
        if restarted := done < self._last_done or total != self._total:
            # what was done before this call, perhaps by an interrupted command, does not count for the rate
            self._started_at, self._first_done, self._total = now, done, total
        self._last_done = done
        rate = (done - self._first_done) / max(now - self._started_at, 1e-9)
        text = self._what + (f", {rate:.0f}/s" if rate >= 1 else f", {rate:.2g}/s" if rate else "")
        if self._progress:
            if restarted:
                self._progress.reset(self._task, total=total, completed=done)
            self._progress.update(self._task, completed=done, total=total, description=text)
        elif self._shown and (now - self._printed_at > SECONDS_BETWEEN_LINES or done == total):
            self._printed_at = now
            print(f"{done} of {total} {text}", file=sys.stderr, flush=True)
