"""Reads a run directory for a report: configuration, log lines, history and status. It changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scale_mae.config import Config, UserError, saved_config
from scale_mae.report.log_lines import MAX_COUNT, Floats, Line, LogLines, column, is_number, read_log
from scale_mae.runs import history
from scale_mae.slurm.status import METRICS_FILE, RunStatus, get_run_status, is_run_directory

EVENT_NUMBERS = frozenset(  # fields of an event that must be numbers
    [
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
    ]
)
EVENT_LISTS = frozenset({"skipped_steps", "positions", "samples", "steps"})  # fields of an event that must be lists


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run directory.

    Attributes:
        dir: Run directory.
        config: Configuration of the run; ``None`` if ``config.yaml`` is missing or damaged.
        log: Log lines.
        history: Events; see :mod:`scale_mae.runs.history`.
        run_status: Status of the run, as ``scale-mae status`` prints it.
        config_problem: Reason for a missing configuration; otherwise empty.
    """

    dir: Path
    config: Config | None
    log: LogLines
    history: list[dict[str, Any]]
    run_status: RunStatus
    config_problem: str = ""

    @property
    def name(self) -> str:
        """The name of the run, which is the name of its directory."""
        return self.dir.resolve().name

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the events of one kind in order."""
        return [event for event in self.history if event["event"] == kind]

    def images_at(self, step: float) -> float:
        """Return the images seen at a step of the schedule."""
        if self.config:
            return step * self.config.train.global_batch
        known = next((line for line in self.log.lines if is_number(line.get("images")) and line["step"]), None)
        return step * (known["images"] / known["step"] if known else 1)

    def images(self, lines: list[Line]) -> Floats:
        """Return the images seen at each log line, ``[N]``."""
        logged, steps = column(lines, "images"), column(lines, "step")
        return np.where(np.isnan(logged), steps * self.images_at(1), logged)


def read_run_record(run: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        UserError: The path is not a run directory.
    """
    if not (is_run_directory(run) or (run / METRICS_FILE).is_file()):
        raise UserError(f"{run}: not a run directory. Pass a directory that contains config.yaml and log.jsonl.")
    try:
        config, problem = saved_config(run / "config.yaml"), ""
    except (UserError, OSError) as error:
        config, problem = None, str(error)
    if config is None:
        problem = problem or "config.yaml is missing or damaged"
    events = [_valid_fields(event) for event in history.read(run)]
    return RunRecord(run, config, read_log(run / METRICS_FILE), events, get_run_status(run), problem)


def _valid_fields(event: dict[str, Any]) -> dict[str, Any]:
    """Return an event without the fields that have a wrong type."""
    kept = {}
    for key, value in event.items():
        if (key in EVENT_NUMBERS and not is_number(value, MAX_COUNT)) or (key in EVENT_LISTS and not isinstance(value, list)):
            continue
        kept[key] = [item for item in value if is_number(item, MAX_COUNT)] if key in EVENT_LISTS and key != "samples" else value
    return kept
