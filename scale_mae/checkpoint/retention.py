"""Retention: which checkpoints a run keeps, and deletion of the others."""

from __future__ import annotations

import shutil
from pathlib import Path

from scale_mae.checkpoint.paths import get_step, list_checkpoints


def select_retained_steps(steps: list[int], keep_latest: int, keep_interval: int | None) -> set[int]:
    """Return the steps of the checkpoints to keep.

    These are the latest ``keep_latest`` checkpoints, and the first checkpoint at or after each multiple of ``keep_interval``.
    A deletion never changes which of the remaining checkpoints are kept later, so this can be applied after every save.

    Args:
        steps: Steps of all checkpoints.
        keep_latest: How many of the latest checkpoints to keep; at least 1.
        keep_interval: In steps. ``None`` keeps only the latest ones.
    """
    first_of_interval: dict[int, int] = {}
    if keep_interval:
        for step in sorted(steps):
            first_of_interval.setdefault(step // keep_interval, step)
    first_of_interval.pop(0, None)  # no multiple comes before the first interval
    return {*sorted(steps)[-keep_latest:], *first_of_interval.values()}


def delete_old_checkpoints(run_dir: Path, newest: Path, keep_latest: int, keep_interval: int | None) -> None:
    """Delete the checkpoints of a run that are not retained.

    Checkpoints of later steps than ``newest`` are neither counted nor deleted. They remain from before a resume.

    Args:
        run_dir: The run directory.
        newest: The checkpoint that was saved last.
        keep_latest: See :func:`select_retained_steps`.
        keep_interval: See :func:`select_retained_steps`.
    """
    checkpoints = {get_step(path): path for path in list_checkpoints(run_dir) if path.name <= newest.name}
    for step in checkpoints.keys() - select_retained_steps(list(checkpoints), keep_latest, keep_interval):
        # rename first: a checkpoint that is deleted in part must not have the name of a checkpoint
        hidden = checkpoints[step].with_name(f".{checkpoints[step].name}.tmp")
        try:
            checkpoints[step].rename(hidden)
            shutil.rmtree(hidden)
        except OSError:
            continue  # the next save tries again
