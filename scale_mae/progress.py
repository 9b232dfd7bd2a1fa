"""Progress of counted work, for people: a bar with rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

EVERY = 10.0  # seconds between lines


class Bar:
    """Shows (done, total) of ``what`` on standard error; not ``shown``, it shows nothing: several processes need one bar."""

    def __init__(self, what: str, *, shown: bool = True) -> None:
        self._what, self._told, self._began = what, 0.0, time.monotonic()
        columns = (
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self._shown = shown
        self._progress = Progress(*columns, console=Console(stderr=True)) if shown and sys.stderr.isatty() else None
        self._first: int | None = None

    def __enter__(self) -> Bar:
        if self._progress:
            self._task = self._progress.add_task(self._what, total=None)
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress:
            self._progress.stop()

    def move(self, done: int, total: int) -> None:
        """So much of so much is done."""
        now = time.monotonic()
        self._first = done if self._first is None else self._first  # work of an earlier call is not this one's rate
        rate = (done - self._first) / max(now - self._began, 1e-9)
        if self._progress:
            self._progress.update(self._task, completed=done, total=total, description=f"{self._what}, {rate:.0f}/s")
        elif self._shown and (now - self._told > EVERY or done == total):
            self._told = now
            print(f"{done} of {total} {self._what}, {rate:.0f}/s", file=sys.stderr, flush=True)
