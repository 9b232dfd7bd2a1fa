"""Cancel a run: let it save a checkpoint and stop, and keep its jobs from restarting."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path

from scale_mae.config import UserError
from scale_mae.slurm.paths import cancelled_jobs_path
from scale_mae.slurm.queue import QueuedJob, SlurmError, get_queued_jobs, run_slurm_command
from scale_mae.slurm.status import LOCK_FILE
from scale_mae.system.lock import lock_holder


def cancel_run(run_dir: Path) -> str:
    """Stop a run after it has saved a checkpoint, and keep its jobs from restarting. Return a message for the user.

    Raises:
        UserError: No job and no process of this run exists, or the process runs on another host.
    """
    try:
        jobs = get_queued_jobs(run_dir)
    except SlurmError:  # a host without Slurm
        jobs = {}
    return _cancel_jobs(run_dir, jobs) if jobs else _stop_process(run_dir)


def _cancel_jobs(run_dir: Path, jobs: dict[int, QueuedJob]) -> str:
    with cancelled_jobs_path(run_dir).open("a") as file:
        file.write("".join(f"{number}\n" for number in jobs))
    running = [number for number, job in jobs.items() if job.state == "RUNNING"]
    waiting = [number for number in jobs if number not in running]
    if waiting:
        run_slurm_command("scancel", *map(str, waiting))
    for number in running:
        # This signals the job steps, not the job script. The script finds its number in the file and lets the job end.
        run_slurm_command("scancel", "--signal=TERM", str(number))
    messages = [f"Job {number} saves a checkpoint and stops." for number in running]
    return " ".join(messages + [f"Job {number} is removed from the queue." for number in waiting])


def _stop_process(run_dir: Path) -> str:
    holder = lock_holder(run_dir / LOCK_FILE) or ""
    match = re.match(r"process (\d+) on (\S+?)(,|$)", holder)
    if not match:
        raise UserError(f"{run_dir}: no job and no process of this run exists. Check the path of the run directory.")
    if match[2] != socket.gethostname():
        raise UserError(
            f"{run_dir}: the run is active in {holder}. Run scale-mae cancel there, or send SIGTERM to the process."
        )
    os.kill(int(match[1]), signal.SIGTERM)
    return f"{holder[0].upper()}{holder[1:]} saves a checkpoint and stops."
