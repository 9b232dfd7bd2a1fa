"""Where metrics and messages go: a progress bar or plain lines for people, ``log.txt`` and ``log.jsonl`` for later."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from scale_mae.metrics.meter import Metrics


class Sink(Protocol):
    """Takes messages and metrics somewhere."""

    def say(self, message: str) -> None:
        """A message for people."""

    def metrics(self, metrics: Metrics) -> None:
        """The metrics of one log step."""

    def close(self) -> None:
        """No more will come."""


class Log:
    """Hands everything to all sinks. A sink that fails is reported once and left out; it never stops a run."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.say(f"stopped: {error}")
        self._each(lambda sink: sink.close())

    def say(self, message: str) -> None:
        """A message for people."""
        self._each(lambda sink: sink.say(message))

    def metrics(self, metrics: Metrics) -> None:
        """The metrics of one log step."""
        self._each(lambda sink: sink.metrics(metrics))

    def _each(self, action: Callable[[Sink], Any]) -> None:
        for sink in list(self._sinks):
            try:
                action(sink)
            except Exception as error:
                self._sinks.remove(sink)
                print(f"{type(sink).__name__} failed and is left out: {error}", file=sys.stderr, flush=True)


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

    def say(self, message: str) -> None:
        """Print above the bar."""
        if self._bar:
            self._bar.console.print(message, highlight=False, markup=False)
        else:
            print(message, file=sys.stderr, flush=True)

    def metrics(self, metrics: Metrics) -> None:
        """Move the bar, or print a line."""
        line = describe(metrics, self._total)
        if self._bar:
            self._bar.update(self._task, completed=float(metrics["step"] or 0), description=line)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar:
            self._bar.stop()


class TextSink:
    """Plain lines with the time, appended to a file."""

    def __init__(self, path: Path, total_steps: int) -> None:
        self._file, self._total = open(path, "a", 1, "utf-8", "backslashreplace"), total_steps

    def say(self, message: str) -> None:
        """Write a line."""
        self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    def metrics(self, metrics: Metrics) -> None:
        """Write a line."""
        self.say(describe(metrics, self._total))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class JsonSink:
    """One JSON object a log step, appended to a file. After a crash some steps can appear twice; the later line counts."""

    def __init__(self, path: Path) -> None:
        whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
        self._file = open(path, "a", buffering=1)
        if not whole:
            self._file.write("\n")  # a process killed while writing left half a line

    def say(self, message: str) -> None:
        """Messages are not metrics."""

    def metrics(self, metrics: Metrics) -> None:
        """Write a line."""
        self._file.write(json.dumps(metrics) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def describe(metrics: Metrics, total_steps: int) -> str:
    """One line for people."""
    left = int(metrics["time_left_s"] or 0)
    norm = metrics["grad_norm"]
    return (
        f"step {metrics['step']}/{total_steps}  epoch {metrics['epoch']:.2f}  loss {metrics['loss']:.4f}  "
        f"lr {metrics['lr']:.2e}  grad norm {'-' if norm is None else format(norm, '.3g')}  "
        f"{metrics['images_per_s']:.0f} images/s  {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
    )


def make_log(run_dir: Path, total_steps: int, first_step: int) -> Log:
    """Console, ``log.txt`` and ``log.jsonl``."""
    return Log(
        [
            ConsoleSink(total_steps, first_step),
            TextSink(run_dir / "log.txt", total_steps),
            JsonSink(run_dir / "log.jsonl"),
        ]
    )
