"""How runs stand, and stopping them: from their directories and, where there is Slurm, its queue."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scale_mae.checkpoint.store import checkpoints
from scale_mae.config import UserError
from scale_mae.runs import exit_status, history
from scale_mae.slurm.queue import FOLDER, STOP, SlurmError, call, queued
from scale_mae.system.lock import lock_holder

METRICS, LOCK = "log.jsonl", "run.lock"
STATE_WIDTH = 80  # of several runs


@dataclass(frozen=True)
class RunStatus:
    """How a run stands.

    Attributes:
        run: its directory.
        state: such as ``running (job 12)``, ``waiting (job 12: Priority)``, ``finished``, ``stopped by SIGTERM after step 40``.
        step: optimizer steps done at the last log line; None before the first.
        total_steps: of the schedule.
        loss: at that line.
        images_per_s: likewise.
        eta_s: likewise.
        checkpoint: newest; None: there is none.
        checkpoint_age_s: since it was committed.
        restarts: times that it was started again, as its history tells; None: that tells of no start, though steps were logged.
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


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory."""
    return (folder / "config.yaml").is_file() or (folder / FOLDER / "config.yaml").is_file()


def find_runs(path: Path) -> list[Path]:
    """The run directory itself, or all below a folder.

    Raises:
        UserError: none.
    """
    found = [path] if is_run(path) else sorted(f for f in path.glob("*") if is_run(f)) if path.is_dir() else []
    if not found:
        raise UserError(f"{path}: no run directory here; name one, or a folder of them")
    return found


def run_status(run: Path) -> RunStatus:
    """How a run stands."""
    last, kept = _last_metrics(run), checkpoints(run)
    facts: dict[str, Any] = {key: last.get(key) for key in ("step", "total_steps", "loss", "images_per_s", "eta_s")}
    if kept:
        facts |= {"checkpoint": kept[-1].name, "checkpoint_age_s": time.time() - kept[-1].stat().st_mtime}
    return RunStatus(run, _state(run), **facts, restarts=_restarts(run, logged=bool(last)))


def _restarts(run: Path, *, logged: bool) -> int | None:
    try:
        told = [event.get("restarts") for event in history.read(run) if event["event"] == "start"]
    except OSError:  # not ours to read
        return None
    return next((number for number in reversed(told) if type(number) is int), None if logged else 0)


def _state(run: Path) -> str:
    with suppress(SlurmError):  # no Slurm here
        live = queued(run)
        if live:
            number, (state, reason) = next(iter(live.items()))
            stopping = ", stopping" if str(number) in _lines(run / FOLDER / STOP) else ""
            if state == "PENDING":
                return f"waiting (job {number}: {reason})"
            return f"{state.lower()} (job {number}{stopping})"
    if who := lock_holder(run / LOCK):
        return f"running ({who})"
    try:
        return (run / exit_status.FILE).read_text().strip() or "unknown"
    except OSError:
        return "ended without a word" if (run / METRICS).exists() else "not started"


def _last_metrics(run: Path) -> dict[str, Any]:
    """The last whole line of the metrics; empty where there is none."""
    try:
        with open(run / METRICS, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        with suppress(ValueError, RecursionError):
            found = json.loads(line)
            if isinstance(found, dict):
                return found
    return {}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def cancel(run: Path) -> str:
    """Stop a run after a checkpoint, and keep its jobs from starting again; what was done.

    Raises:
        UserError: nothing of it runs or waits, or only where it cannot be reached from here.
    """
    try:
        live = queued(run)
    except SlurmError:
        live = {}
    if live:
        with (run / FOLDER / STOP).open("a") as file:
            file.write("".join(f"{number}\n" for number in live))
        running = [number for number, (state, _) in live.items() if state == "RUNNING"]
        others = [number for number in live if number not in running]
        if others:
            call("scancel", *map(str, others))
        for number in running:  # the steps of the job, not its script, which sees the file and lets the job end
            call("scancel", "--signal=TERM", str(number))
        told = [f"job {number} stops after a checkpoint" for number in running]
        return "; ".join(told + [f"job {number} taken from the queue" for number in others])
    who = lock_holder(run / LOCK) or ""
    found = re.match(r"process (\d+) on (\S+?)(,|$)", who)
    if not found:
        raise UserError(f"{run}: nothing of this run is running or waiting")
    if found[2] != socket.gethostname():
        raise UserError(f"{run}: {who} has it, which cannot be reached from here; send that process SIGTERM")
    os.kill(int(found[1]), signal.SIGTERM)
    return f"{who} stops after a checkpoint"


def show(found: list[RunStatus]) -> None:
    """Print a table, or for a single run a line a fact."""
    rows = [_row(one) for one in found]
    if len(rows) == 1:
        width = max(map(len, rows[0]))
        print("\n".join(f"{key:<{width}}  {value}" for key, value in rows[0].items()))
        return
    table = Table(box=None, pad_edge=False)
    for key in rows[0]:
        table.add_column(key, overflow="fold", justify="left" if key in ("run", "state", "checkpoint") else "right")
    for row in rows:
        row["state"] = shorten(row["state"], STATE_WIDTH, placeholder=" ...")  # alone, a run tells all of its error
        table.add_row(*(Text(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _row(s: RunStatus) -> dict[str, str]:
    share = f" ({s.step / s.total_steps:.0%})" if s.step is not None and s.total_steps else ""
    age = f"{s.checkpoint}, {duration(s.checkpoint_age_s)} ago" if s.checkpoint and s.checkpoint_age_s is not None else "-"
    return {
        "run": str(s.run),
        "state": s.state,
        "step": f"{s.step} of {s.total_steps}{share}" if s.step is not None else "-",
        "loss": "-" if s.loss is None else f"{s.loss:.4f}",
        "images/s": "-" if s.images_per_s is None else f"{s.images_per_s:.0f}",
        "time left": "-" if s.eta_s is None else duration(s.eta_s),
        "checkpoint": age,
        "restarts": "-" if s.restarts is None else str(s.restarts),
    }


def duration(seconds: float) -> str:
    """``2 d 3 h``, ``3 h 20 min``, ``5 min`` or ``12 s``."""
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{whole} s"
