"""Show the status of runs, from their directories and from Slurm's queue if there is one."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scale_mae.checkpoint.paths import list_checkpoints
from scale_mae.config import UserError
from scale_mae.runs import exit_status, history
from scale_mae.slurm.paths import cancelled_jobs_path, job_config_path
from scale_mae.slurm.queue import SlurmError, get_queued_jobs
from scale_mae.system.durations import format_duration
from scale_mae.system.lock import lock_holder

METRICS_FILE, LOCK_FILE = "log.jsonl", "run.lock"
TAIL_BYTES = 65536  # the end of the metrics file that is searched for the last complete line
STATE_WIDTH = 80  # characters of the state in the table of several runs
TABLE_WIDTH = 200  # characters of that table if the output is not a terminal


@dataclass(frozen=True)
class RunStatus:
    """The status of a run.

    Attributes:
        run: Run directory.
        state: For instance ``running (job 12)``, ``pending (job 12: Priority)``, ``finished`` or
            ``stopped by SIGTERM after step 40``.
        step: Optimizer steps done at the last log line. ``None`` means that no line exists.
        total_steps: Optimizer steps of the whole run.
        loss: Loss in the last log line.
        images_per_s: Images per second in the last log line.
        eta_s: Estimated seconds to the end of the run in the last log line.
        checkpoint: Name of the newest checkpoint. ``None`` means that no checkpoint exists.
        checkpoint_age_s: Seconds since that checkpoint was committed.
        restarts: Number of starts after the first one. ``None`` means that the history does not contain it.
    """

    run: Path
    state: str
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    images_per_s: float | None = None
    eta_s: float | None = None
    checkpoint: str | None = None
    checkpoint_age_s: float | None = None
    restarts: int | None = 0


def is_run_directory(folder: Path) -> bool:
    """Return whether a folder is a run directory."""
    return (folder / "config.yaml").is_file() or job_config_path(folder).is_file()


def find_runs(path: Path) -> list[Path]:
    """Return ``path`` if it is a run directory, and otherwise the run directories directly in it.

    Raises:
        UserError: There is no run directory.
    """
    runs = [path] if is_run_directory(path) else sorted(folder for folder in path.glob("*") if is_run_directory(folder))
    if not runs:
        raise UserError(
            f"{path}: not a run directory, and contains none. Name a run directory, or a folder that contains some."
        )
    return runs


def get_run_status(run: Path) -> RunStatus:
    """Return the status of a run."""
    metrics, saved = _read_last_metrics(run), list_checkpoints(run)
    return RunStatus(
        run=run,
        state=_get_state(run),
        **{key: metrics.get(key) for key in ("step", "total_steps", "loss", "images_per_s", "eta_s")},
        checkpoint=saved[-1].name if saved else None,
        checkpoint_age_s=time.time() - saved[-1].stat().st_mtime if saved else None,
        restarts=_count_restarts(run, has_metrics=bool(metrics)),
    )


def _count_restarts(run: Path, *, has_metrics: bool) -> int | None:
    try:
        counts = [event.get("restarts") for event in history.read(run) if event["event"] == "start"]
    except OSError:  # for instance a file of another user
        return None
    return next((count for count in reversed(counts) if type(count) is int), None if has_metrics else 0)


def _get_state(run: Path) -> str:
    with suppress(SlurmError):  # a host without Slurm
        for number, job in get_queued_jobs(run).items():  # the first job of the run decides
            if job.state == "PENDING":
                return f"pending (job {number}: {job.reason})"
            stopping = ", stopping" if str(number) in _read_words(cancelled_jobs_path(run)) else ""
            return f"{job.state.lower()} (job {number}{stopping})"
    if holder := lock_holder(run / LOCK_FILE):
        return f"running ({holder})"
    try:
        return (run / exit_status.FILE).read_text().strip() or "unknown"
    except OSError:
        return "crashed or killed (no exit status)" if (run / METRICS_FILE).exists() else "not started"


def _read_last_metrics(run: Path) -> dict[str, Any]:
    """Return the last complete line of the metrics, or an empty dict if there is none."""
    try:
        with open(run / METRICS_FILE, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        with suppress(ValueError, RecursionError):
            metrics = json.loads(line)
            if isinstance(metrics, dict):
                return metrics
    return {}


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def print_status(runs: Sequence[RunStatus]) -> None:
    """Print one run as a list of fields, and several runs as a table."""
    rows = [_format_fields(run) for run in runs]
    if len(rows) == 1:
        width = max(map(len, rows[0]))
        print("\n".join(f"{key:<{width}}  {value}" for key, value in rows[0].items()))
        return
    table = Table(box=None, pad_edge=False)
    for key in rows[0]:
        table.add_column(key, overflow="fold", justify="left" if key in ("run", "state", "checkpoint") else "right")
    for row in rows:
        row["state"] = shorten(row["state"], STATE_WIDTH, placeholder=" ...")  # the list of one run shows the whole error
        table.add_row(*(Text(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else TABLE_WIDTH).print(table)


def _format_fields(status: RunStatus) -> dict[str, str]:
    share = f" ({status.step / status.total_steps:.0%})" if status.step is not None and status.total_steps else ""
    has_checkpoint = status.checkpoint is not None and status.checkpoint_age_s is not None
    return {
        "run": str(status.run),
        "state": status.state,
        "step": f"{status.step} of {status.total_steps}{share}" if status.step is not None else "-",
        "loss": f"{status.loss:.4f}" if status.loss is not None else "-",
        "images/s": f"{status.images_per_s:.0f}" if status.images_per_s is not None else "-",
        "time left": format_duration(status.eta_s) if status.eta_s is not None else "-",
        "checkpoint": f"{status.checkpoint}, {format_duration(status.checkpoint_age_s or 0)} ago" if has_checkpoint else "-",
        "restarts": str(status.restarts) if status.restarts is not None else "-",
    }
