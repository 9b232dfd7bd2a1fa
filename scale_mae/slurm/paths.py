"""Paths of the files that Slurm jobs use in a run directory. The job script defines the same paths for itself."""

from __future__ import annotations

from pathlib import Path


def slurm_dir(run_dir: Path) -> Path:
    """Return the folder of all other files below."""
    return run_dir / "slurm"


def job_script_path(run_dir: Path) -> Path:
    """Return the path of the job script."""
    return slurm_dir(run_dir) / "job.sh"


def job_log_path(run_dir: Path, job_id: int | str) -> Path:
    """Return the path of the output of a job. Slurm replaces ``%j`` with the job's number."""
    return slurm_dir(run_dir) / f"job-{job_id}.log"


def job_config_path(run_dir: Path) -> Path:
    """Return the path of the config as it was when the job was submitted."""
    return slurm_dir(run_dir) / "config.yaml"


def code_dir(run_dir: Path) -> Path:
    """Return the folder of the code as it was when the job was submitted."""
    return slurm_dir(run_dir) / "code"


def cancelled_jobs_path(run_dir: Path) -> Path:
    """Return the file in which ``scale-mae cancel`` lists job numbers, one per line. The job script reads it."""
    return slurm_dir(run_dir) / "cancelled_jobs"


def bad_nodes_path(run_dir: Path) -> Path:
    """Return the file in which preflight lists bad nodes, one name per line. The job script reads it."""
    return slurm_dir(run_dir) / "bad_nodes"
