"""A run directory read for a report: its config, log lines, history and checkpoints. Nothing in it is changed."""

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

from scale_mae.config import Config, UserError, saved_config
from scale_mae.runs import history
from scale_mae.slurm.status import METRICS_FILE, RunStatus, get_run_status, is_run_directory

Floats = NDArray[np.float64]
Line = dict[str, Any]
LARGEST = 1e300  # of a number in a log: one that another may be multiplied with
LARGEST_FACT = 1e18  # of steps, and of the numbers of an event; what is larger is damage
NUMBERS = frozenset(  # of an event
    {
        "time",
        "step",
        "restarts",
        "world_size",
        "zero_stage",
        "number",
        "detected",
        "to",
        "seconds",
        "blocked_seconds",
        "bytes",
        "total",
    }
)
LISTS = frozenset({"skipped_steps", "positions", "samples", "steps"})
SHORTEST, SHARE = 5, 50  # smoothing where a run does not: a mean over 5 log lines, or a 50th of them if that is more


@dataclass(frozen=True)
class Lines:
    """Log lines of a run in the order of their steps.

    Attributes:
        lines: those that count, steps rising.
        taken_back: those of steps that were done again, after a crash or a rollback, in the order of the file.
        unreadable: lines that a crash or a full disk cut short.
        written: all that can be read, in the order of the file.
    """

    lines: list[Line]
    taken_back: list[Line] = field(default_factory=list)
    unreadable: int = 0
    written: list[Line] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lines)

    def column(self, key: str) -> Floats:
        """One value a line, ``[N]``; NaN where it is missing, null or not finite."""
        return column(self.lines, key)

    def has(self, key: str) -> bool:
        """Whether any line tells it."""
        return any(_is_number(line.get(key)) for line in self.lines)

    def last(self, key: str) -> float | None:
        """The newest value that is not null."""
        return next((float(line[key]) for line in reversed(self.lines) if _is_number(line.get(key))), None)

    @cached_property
    def smoothed(self) -> tuple[Floats, str]:
        """The loss smoothed, ``[N]``, and how."""
        if self.has("loss_smoothed"):
            return self.column("loss_smoothed"), "as the run itself smooths it"
        around = max(SHORTEST, len(self) // SHARE) // 2
        return running_mean(self.column("loss"), around), f"the mean of {2 * around + 1} log lines around each"


def column(lines: Iterable[Line], key: str) -> Floats:
    """See :meth:`Lines.column`."""
    return np.array([line[key] if _is_number(line.get(key)) else np.nan for line in lines], np.float64)


def _is_number(value: Any, largest: float = LARGEST) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < largest  # NaN is not either


def running_mean(values: Floats, around: int) -> Floats:
    """Mean of each value and the ``around`` before and after it, ``[N]``; fewer at the ends, and none that is not finite."""
    known = np.isfinite(values)
    sums, counts = (np.concatenate([np.zeros(1), np.cumsum(part)]) for part in (np.where(known, values, 0.0), known))
    here = np.arange(len(values))
    reach = np.minimum(around, np.minimum(here, here[::-1]))  # as far on either side, or a slope would bend at the ends
    start, stop = here - reach, here + reach + 1
    number = counts[stop] - counts[start]
    return np.where(number > 0, (sums[stop] - sums[start]) / np.maximum(number, 1), np.nan)


def read_lines(path: Path) -> Lines:
    """Read ``log.jsonl``. A line takes back all earlier ones of its own or a later step: the run stood there again.

    A value that is no number is left out; one that is not finite is null. A last line that has no end yet is being written.

    Raises:
        UserError: it cannot be read.
    """
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return Lines([])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    lines: list[Line] = []
    taken_back: list[Line] = []
    *rows, growing = text.split("\n")
    found = [_line(row) for row in rows if row.strip()]
    written = [line for line in [*found, _line(growing)] if line]
    for line in written:
        while lines and lines[-1]["step"] >= line["step"]:
            taken_back.append(lines.pop())
        lines.append(line)
    return Lines(lines, sorted(taken_back, key=lambda line: line["step"]), found.count(None), written)


def _line(row: str) -> Line | None:
    try:
        line = json.loads(row)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int) or not _is_number(line["step"], LARGEST_FACT):
        return None
    missing = {
        key: None for key, value in line.items() if value is None or (isinstance(value, float) and not math.isfinite(value))
    }
    return {key: value for key, value in line.items() if _is_number(value)} | missing


def _event(event: dict[str, Any]) -> dict[str, Any]:
    """An event without the values that cannot be what their names say."""
    kept = {}
    for key, value in event.items():
        if (key in NUMBERS and not _is_number(value, LARGEST_FACT)) or (key in LISTS and not isinstance(value, list)):
            continue
        kept[key] = [one for one in value if _is_number(one, LARGEST_FACT)] if key in LISTS and key != "samples" else value
    return kept


@dataclass(frozen=True)
class Record:
    """What a run directory holds.

    Attributes:
        dir: the run directory.
        config: None where ``config.yaml`` is missing or damaged; ``config_problem`` says which.
        log: its log lines.
        history: its events, see :mod:`scale_mae.runs.history`.
        standing: its state, as ``scale-mae status`` tells it.
        config_problem: in words; empty when there is a config.
    """

    dir: Path
    config: Config | None
    log: Lines
    history: list[dict[str, Any]]
    run_status: RunStatus
    config_problem: str = ""

    @property
    def name(self) -> str:
        """What people call the run: the name of its directory."""
        return self.dir.resolve().name

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind, in order."""
        return [event for event in self.history if event["event"] == kind]

    def images_at(self, step: float) -> float:
        """Place in the schedule, in images, at a step."""
        if self.config:
            return step * self.config.train.global_batch
        known = next((line for line in self.log.lines if _is_number(line.get("images")) and line["step"]), None)
        return step * (known["images"] / known["step"] if known else 1)

    def images(self, lines: list[Line]) -> Floats:
        """Place in the schedule, in images, of log lines, ``[N]``."""
        told, steps = column(lines, "images"), column(lines, "step")
        return np.where(np.isnan(told), steps * self.images_at(1), told)


def read_record(run: Path) -> Record:
    """Read a run directory.

    Raises:
        UserError: it is none.
    """
    if not (is_run_directory(run) or (run / METRICS_FILE).is_file()):
        raise UserError(f"{run}: no run directory; name one, which holds config.yaml and log.jsonl")
    try:
        config, problem = saved_config(run / "config.yaml"), ""
    except (UserError, OSError) as error:
        config, problem = None, str(error)
    if config is None:
        problem = problem or "config.yaml is missing or damaged"
    return Record(
        run,
        config,
        read_lines(run / METRICS_FILE),
        [_event(event) for event in history.read(run)],
        get_run_status(run),
        problem,
    )
