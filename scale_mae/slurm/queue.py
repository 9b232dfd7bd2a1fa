"""Run Slurm's commands and ask its queue for the jobs of a run."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from scale_mae.config import UserError
from scale_mae.slurm.paths import job_script_path

TIMEOUT_SECONDS = 60
KEPT_VARIABLES = ("SLURM_CONF", "SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_QOS")
SLURM_PREFIXES = ("SLURM_", "SRUN_", "SBATCH_")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class SlurmError(UserError):
    """Slurm is not installed, does not answer, or rejects a request; or a run cannot become a job."""


@dataclass(frozen=True)
class QueuedJob:
    """A job in Slurm's queue.

    Attributes:
        state: Slurm's name of the job's state, such as ``RUNNING`` or ``PENDING``.
        reason: Why the job waits, such as ``Priority``.
    """

    state: str
    reason: str


def get_queued_jobs(run_dir: Path) -> dict[int, QueuedJob]:
    """Return the jobs of a run that run or wait, by job number in ascending order.

    A job belongs to the run if it executes the job script of the run directory. ``scale-mae submit`` and a plain ``sbatch``
    of that script make no difference.

    Raises:
        SlurmError: Slurm is not installed or does not answer.
    """
    script = str(job_script_path(run_dir.absolute()))
    jobs: dict[int, QueuedJob] = {}
    for line in run_slurm_command("squeue", "--noheader", "--me", "--sort=i", "--format=%i|%T|%r|%o").splitlines():
        number, state, reason, command = line.split("|", 3)
        if number.isdigit() and (command == script or command.startswith(f"{script} ")):
            jobs[int(number)] = QueuedJob(state, reason)
    return jobs


def run_slurm_command(*command: str, env: dict[str, str] | None = None) -> str:
    """Run one of Slurm's commands and return its standard output.

    Args:
        command: The command and its arguments.
        env: Environment of the command. ``None`` means the environment of this process.

    Raises:
        SlurmError: The command does not exist, fails, or does not end in time.
    """
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except FileNotFoundError:
        raise SlurmError(
            f"{command[0]} is not on the PATH. Run this command on a host with Slurm, or train without Slurm: "
            "scale-mae pretrain RECIPE"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{command[0]} did not answer in {TIMEOUT_SECONDS} s. Check the Slurm controller: scontrol ping"
        ) from None
    if done.returncode:
        raise SlurmError(f"{command[0]} failed: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout


def get_submission_environment() -> dict[str, str]:
    """Return the environment for ``sbatch``: the current one without variables of an outer job or launcher.

    Slurm's variables of an outer job would take precedence over the options in the job script.
    """
    return {name: value for name, value in os.environ.items() if name in KEPT_VARIABLES or not _belongs_to_launcher(name)}


def _belongs_to_launcher(name: str) -> bool:
    return name.startswith(SLURM_PREFIXES) or name in RANK_VARIABLES
