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

from scale_mae import history
from scale_mae.config import Config, UserError, saved_config
from scale_mae.slurm.runs import METRICS, Standing, is_run, standing

Floats = NDArray[np.float64]
Line = dict[str, Any]
SHORTEST, SHARE = 5, 50  # smoothing where a run does not: a mean over 5 log lines, or a 50th of them if that is more


@dataclass(frozen=True)
class Lines:
    """Log lines of a run in the order of their steps.

    Attributes:
        lines: those that count, steps rising.
        taken_back: those of steps that were done again, after a crash or a rollback, in the order of the file.
        unreadable: lines that a crash or a full disk cut short.
    """

    lines: list[Line]
    taken_back: list[Line] = field(default_factory=list)
    unreadable: int = 0

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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


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
    unreadable = 0
    for row in text.split("\n"):
        if not row.strip():
            continue
        try:
            line = json.loads(row)
            step = line["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            unreadable += 1
            continue
        if not isinstance(step, int) or isinstance(step, bool):
            unreadable += 1
            continue
        while lines and lines[-1]["step"] >= step:
            taken_back.append(lines.pop())
        lines.append(line)
    return Lines(lines, sorted(taken_back, key=lambda line: line["step"]), unreadable)


@dataclass(frozen=True)
class Record:
    """What a run directory holds.

    Attributes:
        dir: the run directory.
        config: None where ``config.yaml`` is missing or damaged; ``config_problem`` says which.
        log: its log lines.
        history: its events, see :mod:`scale_mae.history`.
        standing: its state, as ``scale-mae status`` tells it.
        config_problem: in words; empty when there is a config.
    """

    dir: Path
    config: Config | None
    log: Lines
    history: list[dict[str, Any]]
    standing: Standing
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
    if not (is_run(run) or (run / METRICS).is_file()):
        raise UserError(f"{run}: no run directory; name one, which holds config.yaml and log.jsonl")
    try:
        config, problem = saved_config(run / "config.yaml"), ""
    except (UserError, OSError) as error:
        config, problem = None, str(error)
    if config is None:
        problem = problem or "config.yaml is missing or damaged"
    return Record(run, config, read_lines(run / METRICS), history.read(run), standing(run), problem)
