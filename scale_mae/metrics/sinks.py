"""Sinks of log messages and metrics: the console, ``log.txt`` and ``log.jsonl``."""

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
    """Receives the log messages and the metrics of a run."""

    def write_message(self, message: str) -> None:
        """Write a message."""

    def write_metrics(self, metrics: Metrics) -> None:
        """Write the metrics of one log step."""

    def close(self, *, failed: bool = False) -> None:
        """Close the sink. ``failed`` states whether an error ends the run."""


class Log:
    """Passes messages and metrics to all sinks. A sink that raises is reported once and removed; it never stops the run."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.write_message(f"Stopped by an error: {error}")
        self._call_each(lambda sink: sink.close(failed=error is not None))

    def write_message(self, message: str) -> None:
        """Write a message."""
        self._call_each(lambda sink: sink.write_message(message))

    def write_metrics(self, metrics: Metrics) -> None:
        """Write the metrics of one log step."""
        self._call_each(lambda sink: sink.write_metrics(metrics))

    def _call_each(self, action: Callable[[Sink], Any]) -> None:
        for sink in list(self._sinks):
            try:
                action(sink)
            except Exception as error:
                self._sinks.remove(sink)
                print_to_stderr(f"{type(sink).__name__} failed and receives no more logs: {error}")


def print_to_stderr(message: str) -> None:
    """Print a line to standard error. Errors are ignored."""
    with suppress(OSError, ValueError):  # standard error may be a file on a full disk, or closed
        print(message, file=sys.stderr, flush=True)


class LineWriter:
    """Appends lines to a file. A line that cannot be written is dropped; the next line is tried again.

    A failure is reported on standard error once, until a write succeeds again. A line that a full disk truncates is removed. A
    line that a crash truncated is terminated before the next line.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, open(path, "a+b", buffering=0)
        self._dropped = 0

    def append(self, line: str) -> None:
        """Append a line."""
        try:
            self._append(line.encode("utf-8", "backslashreplace") + b"\n")
        except OSError as error:
            if not self._dropped:
                print_to_stderr(
                    f"{self._path}: cannot be written ({error.strerror}). Lines are dropped until it is writable again."
                )
            self._dropped += 1
        else:
            if self._dropped:
                dropped = "1 line was" if self._dropped == 1 else f"{self._dropped} lines were"
                print_to_stderr(f"{self._path}: writable again. {dropped} dropped.")
            self._dropped = 0

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
    """Shows a progress bar with speed and ETA on a terminal, and prints plain lines otherwise."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._total = total_steps
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (BarColumn(bar_width=20), TaskProgressColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(f"step {first_step}/{total_steps}", total=total_steps, completed=first_step)
            self._bar.start()

    def write_message(self, message: str) -> None:
        """Print a message, above the progress bar if there is one."""
        if self._bar:
            self._bar.console.print(message, highlight=False, markup=False)
        else:
            print_to_stderr(message)

    def write_metrics(self, metrics: Metrics) -> None:
        """Update the progress bar, or print a line."""
        line = format_metrics(metrics, self._total)
        if self._bar:
            self._bar.update(self._task, completed=float(metrics["step"] or 0), description=line)
        else:
            print_to_stderr(line)

    def close(self, *, failed: bool = False) -> None:
        """Stop updating the progress bar."""
        if self._bar:
            self._bar.stop()


class TextFileSink:
    """Appends plain lines with the time to a file."""

    def __init__(self, path: Path, total_steps: int) -> None:
        self._lines, self._total = LineWriter(path), total_steps

    def write_message(self, message: str) -> None:
        """Append the message with the time."""
        self._lines.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}")

    def write_metrics(self, metrics: Metrics) -> None:
        """Append the metrics as one readable line."""
        self.write_message(format_metrics(metrics, self._total))

    def close(self, *, failed: bool = False) -> None:
        """Close the file."""
        self._lines.close()


class JsonLinesSink:
    """Appends one JSON object per log step to a file.

    After a crash or a rollback, a step may appear twice. The later line is the valid one.
    """

    def __init__(self, path: Path) -> None:
        self._lines = LineWriter(path)

    def write_message(self, message: str) -> None:
        """Ignore messages."""

    def write_metrics(self, metrics: Metrics) -> None:
        """Append the metrics as one JSON object."""
        self._lines.append(json.dumps(metrics))

    def close(self, *, failed: bool = False) -> None:
        """Close the file."""
        self._lines.close()


def format_metrics(metrics: Metrics, total_steps: int) -> str:
    """Return the most important metrics of a log step as one readable line."""
    eta = int(metrics["eta_s"] or 0)
    loss, grad_norm = metrics["loss"], metrics["grad_norm"]
    loss_text = "not finite" if loss is None else f"{loss:.4f}"
    return (
        f"step {metrics['step']}/{total_steps}  epoch {metrics['epoch']:.2f}  loss {loss_text}  "
        f"lr {metrics['lr']:.2e}  grad norm {'-' if grad_norm is None else format(grad_norm, '.3g')}  "
        f"{metrics['images_per_s']:.0f} images/s  ETA {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}"
    )


def build_log(run_dir: Path, total_steps: int, first_step: int, additional_sinks: Sequence[Sink] = ()) -> Log:
    """Return the log of a run: console, ``log.txt``, ``log.jsonl``, and additional sinks."""
    return Log(
        [
            ConsoleSink(total_steps, first_step),
            TextFileSink(run_dir / "log.txt", total_steps),
            JsonLinesSink(run_dir / "log.jsonl"),
            *additional_sinks,
        ]
    )
