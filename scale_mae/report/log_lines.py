"""Reads ``log.jsonl`` for reports: valid lines, superseded lines, and columns of values."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scale_mae.config import UserError

Floats = NDArray[np.float64]
Line = dict[str, Any]
MAX_VALUE = 1e300  # limit of a number in a log line, so that products of two numbers of practical size do not overflow
MAX_COUNT = 1e18  # limit of a step; a larger number indicates damage
MIN_WINDOW, WINDOW_SHARE = 5, 50  # smoothing of a log without a smoothed loss: over 5 lines, or over 1/50 of the log if larger


@dataclass(frozen=True)
class LogLines:
    """Log lines of a run in the order of their steps.

    Attributes:
        lines: The valid lines, with increasing steps.
        superseded: Lines of steps that a crash or a rollback reverted, in the order of their steps.
        unreadable: Number of lines that a crash or a full disk damaged.
        all_lines: All readable lines in the order of the file.
    """

    lines: list[Line]
    superseded: list[Line] = field(default_factory=list)
    unreadable: int = 0
    all_lines: list[Line] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lines)

    def column(self, key: str) -> Floats:
        """Return one value per valid line, ``[N]``. A missing, null or non-finite value is NaN."""
        return column(self.lines, key)

    def has(self, key: str) -> bool:
        """Return whether any line has a value for the key."""
        return any(is_number(line.get(key)) for line in self.lines)

    def last(self, key: str) -> float | None:
        """Return the last value of the key that is not null."""
        return next((float(line[key]) for line in reversed(self.lines) if is_number(line.get(key))), None)

    @cached_property
    def smoothed(self) -> tuple[Floats, str]:
        """The smoothed loss, ``[N]``, and a description of the smoothing."""
        if self.has("loss_smoothed"):
            return self.column("loss_smoothed"), "the moving average that the run computes"
        half_window = max(MIN_WINDOW, len(self) // WINDOW_SHARE) // 2
        return running_mean(self.column("loss"), half_window), f"its mean over {2 * half_window + 1} log lines"


def column(lines: Iterable[Line], key: str) -> Floats:
    """Return one value per line, ``[N]``. A missing, null or non-finite value is NaN."""
    return np.array([line[key] if is_number(line.get(key)) else np.nan for line in lines], np.float64)


def is_number(value: Any, limit: float = MAX_VALUE) -> bool:
    """Return whether a JSON value is a finite number below ``limit`` in magnitude."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < limit  # False for NaN


def running_mean(values: Floats, half_window: int) -> Floats:
    """Return the mean of each value and its ``half_window`` neighbors on either side, ``[N]``.

    Values that are not finite are ignored. The window shrinks towards the ends of the array.
    """
    known = np.isfinite(values)
    sums, counts = (np.concatenate([np.zeros(1), np.cumsum(part)]) for part in (np.where(known, values, 0.0), known))
    index = np.arange(len(values))
    reach = np.minimum(half_window, np.minimum(index, index[::-1]))  # symmetric, so that a slope stays a slope at the ends
    start, stop = index - reach, index + reach + 1
    count = counts[stop] - counts[start]
    return np.where(count > 0, (sums[stop] - sums[start]) / np.maximum(count, 1), np.nan)


def read_log(path: Path) -> LogLines:
    """Read ``log.jsonl``.

    A line supersedes all earlier lines of the same or a later step, because the run returned to that step. Values that are not
    numbers are removed; values that are not finite become null. An incomplete last line is still being written.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return LogLines([])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    lines: list[Line] = []
    superseded: list[Line] = []
    *complete_rows, last_row = text.split("\n")
    parsed = [_parse(row) for row in complete_rows if row.strip()]
    all_lines = [line for line in [*parsed, _parse(last_row)] if line]
    for line in all_lines:
        while lines and lines[-1]["step"] >= line["step"]:
            superseded.append(lines.pop())
        lines.append(line)
    return LogLines(lines, sorted(superseded, key=lambda line: line["step"]), parsed.count(None), all_lines)


def _parse(row: str) -> Line | None:
    try:
        line = json.loads(row)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int) or not is_number(line["step"], MAX_COUNT):
        return None
    missing = {
        key: None for key, value in line.items() if value is None or (isinstance(value, float) and not math.isfinite(value))
    }
    return {key: value for key, value in line.items() if is_number(value)} | missing
