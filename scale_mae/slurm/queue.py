"""Slurm's commands, and which jobs of a run are in its queue."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from scale_mae.config import UserError

FOLDER = "slurm"  # of a run directory
STOP, SCRIPT = "stop", "job.sh"
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class SlurmError(UserError):
    """Slurm is not there, does not answer, or refuses; or a job that cannot be submitted."""


def clean_environment() -> dict[str, str]:
    """Without what an allocation or a launcher around this process left, and what would go before the script's own options."""
    kept = ("SLURM_CONF", "SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_QOS")
    ours = ("SLURM_", "SRUN_", "SBATCH_")
    return {k: v for k, v in os.environ.items() if k in kept or not (k.startswith(ours) or k in RANK_VARIABLES)}


def queued(run_dir: Path) -> dict[int, tuple[str, str]]:
    """The jobs of a run that are in the queue, however they were submitted: their states and why they wait.

    Raises:
        SlurmError: there is no Slurm here, or it does not answer.
    """
    script = str(run_dir.absolute() / FOLDER / SCRIPT)
    found: dict[int, tuple[str, str]] = {}
    for line in call("squeue", "--noheader", "--me", "--sort=i", "--format=%i|%T|%r|%o").splitlines():
        number, state, reason, command = line.split("|", 3)
        if number.isdigit() and (command == script or command.startswith(f"{script} ")):
            found[int(number)] = (state, reason)
    return found


def call(*command: str, env: dict[str, str] | None = None) -> str:
    """What one of Slurm's commands prints.

    Raises:
        SlurmError: it is not there, or fails.
    """
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not on the PATH: no Slurm here? (pretrain runs without one)") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} gave no answer in 60 s; is the Slurm controller up?") from None
    if done.returncode:
        raise SlurmError(f"{command[0]}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout
