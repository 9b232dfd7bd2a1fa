"""Where metrics and messages go: a progress bar or plain lines for people, ``log.txt`` and ``log.jsonl`` for later."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from scale_mae.metrics.calculator import Metrics


class Sink(Protocol):
    """Takes messages and metrics somewhere."""

    def write_message(self, message: str) -> None:
        """A message for people."""

    def write_metrics(self, metrics: Metrics) -> None:
        """The metrics of one log step."""

    def close(self, *, failed: bool = False) -> None:
        """No more will come; ``failed``: as an error ends the run."""


class Log:
    """Hands everything to all sinks. A sink that raises is reported once and left out; it never stops a run."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.write_message(f"stopped: {error}")
        self._each(lambda sink: sink.close(failed=error is not None))

    def write_message(self, message: str) -> None:
        """A message for people."""
        self._each(lambda sink: sink.write_message(message))

    def write_metrics(self, metrics: Metrics) -> None:
        """The metrics of one log step."""
        self._each(lambda sink: sink.write_metrics(metrics))

    def _each(self, action: Callable[[Sink], Any]) -> None:
        for sink in list(self._sinks):
            try:
                action(sink)
            except Exception as error:
                self._sinks.remove(sink)
                print_to_stderr(f"{type(sink).__name__} failed and is left out: {error}")


def print_to_stderr(message: str) -> None:
    """A line on standard error, if that can be written."""
    with suppress(OSError, ValueError):  # on a full disk, or closed
        print(message, file=sys.stderr, flush=True)


class LineWriter:
    """Lines appended to a file. A line that cannot be written is gone; the next one is tried again.

    Failures are told on standard error, once until it goes well again. A line that a full disk or a crash cut short is ended
    before the next one, or taken back.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, open(path, "a+b", buffering=0)
        self._lost = 0

    def append(self, line: str) -> None:
        """Write a line."""
        try:
            self._append(line.encode("utf-8", "backslashreplace") + b"\n")
        except OSError as error:
            if not self._lost:
                print_to_stderr(f"{self._path}: cannot be written ({error.strerror}); lines are missing until it can be")
            self._lost += 1
        else:
            if self._lost:
                print_to_stderr(f"{self._path}: is written again; {self._lost} lines are missing")
            self._lost = 0

    def _append(self, content: bytes) -> None:
        handle = self._file.fileno()
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            content = b"\n" + content
        try:
            while content:
                content = content[os.write(handle, content) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(handle, size)
            raise

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):
            self._file.close()


class ConsoleSink:
    """A progress bar with rate and time left on a terminal, plain lines elsewhere."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._total = total_steps
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (BarColumn(bar_width=20), TaskProgressColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(f"step {first_step}/{total_steps}", total=total_steps, completed=first_step)
            self._bar.start()

    def write_message(self, message: str) -> None:
        """Print above the bar."""
        if self._bar:
            self._bar.console.print(message, highlight=False, markup=False)
        else:
            print_to_stderr(message)

    def write_metrics(self, metrics: Metrics) -> None:
        """Move the bar, or print a line."""
        line = format_metrics(metrics, self._total)
        if self._bar:
            self._bar.update(self._task, completed=float(metrics["step"] or 0), description=line)
        else:
            print_to_stderr(line)

    def close(self, *, failed: bool = False) -> None:
        """Leave the bar as it is."""
        if self._bar:
            self._bar.stop()


class TextFileSink:
    """Plain lines with the time, appended to a file."""

    def __init__(self, path: Path, total_steps: int) -> None:
        self._lines, self._total = LineWriter(path), total_steps

    def write_message(self, message: str) -> None:
        """Write a line."""
        self._lines.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}")

    def write_metrics(self, metrics: Metrics) -> None:
        """Write a line."""
        self.write_message(format_metrics(metrics, self._total))

    def close(self, *, failed: bool = False) -> None:
        """Close the file."""
        self._lines.close()


class JsonLinesSink:
    """One JSON object a log step, appended to a file. After a crash or a rollback steps appear twice; the later line counts."""

    def __init__(self, path: Path) -> None:
        self._lines = LineWriter(path)

    def write_message(self, message: str) -> None:
        """Messages are not metrics."""

    def write_metrics(self, metrics: Metrics) -> None:
        """Write a line."""
        self._lines.append(json.dumps(metrics))

    def close(self, *, failed: bool = False) -> None:
        """Close the file."""
        self._lines.close()


def format_metrics(metrics: Metrics, total_steps: int) -> str:
    """One line for people."""
    left = int(metrics["eta_s"] or 0)
    loss, norm = metrics["loss"], metrics["grad_norm"]
    loss_text = "not finite" if loss is None else f"{loss:.4f}"
    return (
        f"step {metrics['step']}/{total_steps}  epoch {metrics['epoch']:.2f}  loss {loss_text}  "
        f"lr {metrics['lr']:.2e}  grad norm {'-' if norm is None else format(norm, '.3g')}  "
        f"{metrics['images_per_s']:.0f} images/s  {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
    )


def build_log(run_dir: Path, total_steps: int, first_step: int, more: Sequence[Sink] = ()) -> Log:
    """Console, ``log.txt`` and ``log.jsonl``, and whatever is asked for besides."""
    return Log(
        [
            ConsoleSink(total_steps, first_step),
            TextFileSink(run_dir / "log.txt", total_steps),
            JsonLinesSink(run_dir / "log.jsonl"),
            *more,
        ]
    )
