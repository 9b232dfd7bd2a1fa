"""A file in the run directory that says whether rank 0 has ended.

A process that cannot reach rank 0 reads this file. If rank 0 has ended, this process is the one with the problem. Otherwise
the node of rank 0 is bad.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from scale_mae.preflight.bad_nodes import replace_file
from scale_mae.preflight.options import PreflightOptions

RUNNING, ENDED = "running", "ended"


def get_state_path(options: PreflightOptions) -> Path:
    """Return the path of the file. Each start of each job step has its own."""
    numbers = [os.environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID")]
    return options.folder / f"preflight-{'-'.join(numbers)}-{os.environ.get('MASTER_PORT', '0')}"


def mark_rank_0_as_running(options: PreflightOptions) -> None:
    """Record that rank 0 has started."""
    replace_file(get_state_path(options), RUNNING)


def mark_rank_0_as_ended(options: PreflightOptions) -> None:
    """Record that rank 0 has ended, and delete the files of earlier starts."""
    path = get_state_path(options)
    for old in options.folder.glob("preflight-*"):
        if old != path:
            with suppress(OSError):
                old.unlink()
    replace_file(path, ENDED)


def has_rank_0_ended(options: PreflightOptions) -> bool:
    """Return whether rank 0 has ended.

    Raises:
        OSError: The file cannot be read.
    """
    return get_state_path(options).read_text() == ENDED
