"""Progress of counted work, for people: a bar with rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

EVERY = 10.0  # seconds between lines


class ProgressBar:
    """Shows (done, total) of ``what`` on standard error; not ``shown``, it shows nothing: several processes need one bar."""

    def __init__(self, what: str, *, shown: bool = True) -> None:
        self._what, self._told = what, 0.0
        columns = (
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self._shown = shown
        self._progress = Progress(*columns, console=Console(stderr=True)) if shown and sys.stderr.isatty() else None
        self._began, self._first, self._last, self._total = 0.0, 0, 0, -1

    def __enter__(self) -> ProgressBar:
        if self._progress:
            self._task = self._progress.add_task(self._what, total=None)
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress:
            self._progress.stop()

    def move(self, done: int, total: int) -> None:
        """So much of so much is done. Less than before, or of another number, is other work, with a rate of its own."""
        now = time.monotonic()
        if begins := done < self._last or total != self._total:
            self._began, self._first, self._total = now, done, total  # what an earlier call did is not this one's rate
        self._last = done
        rate = (done - self._first) / max(now - self._began, 1e-9)
        text = self._what + (f", {rate:.0f}/s" if rate >= 1 else f", {rate:.2g}/s" if rate else "")
        if self._progress:
            if begins:
                self._progress.reset(self._task, total=total, completed=done)  # nor does it tell the time left
            self._progress.update(self._task, completed=done, total=total, description=text)
        elif self._shown and (now - self._told > EVERY or done == total):
            self._told = now
            print(f"{done} of {total} {text}", file=sys.stderr, flush=True)
