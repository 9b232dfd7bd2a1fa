"""Search for checkpoints: the latest valid one of a run, and the one that a user means by a path.

A checkpoint is valid if it passes :func:`scale_mae.checkpoint.verification.verify`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.checkpoint.paths import CHECKPOINTS_FOLDER, DAMAGED_PREFIX, get_step, list_checkpoints
from scale_mae.checkpoint.verification import Verification, verify


def find_latest_valid(
    run_dir: Path,
    warn: Callable[[str], None],
    *,
    rename_damaged: bool = False,
    checksums: bool = True,
    max_step: int | None = None,
) -> Path | None:
    """Return the latest valid checkpoint of a run, or ``None`` if the run has no checkpoint.

    Args:
        run_dir: The run directory.
        warn: Called with a message for each damaged checkpoint that is skipped.
        rename_damaged: Rename the skipped checkpoints to ``damaged-step-...``. A run that resumes does this. A checkpoint
            that cannot be renamed stays, and the next save of that step replaces it.
        checksums: See :func:`scale_mae.checkpoint.verification.verify`.
        max_step: Ignore checkpoints of later steps.

    Raises:
        CheckpointError: All checkpoints are damaged. None is renamed then.
    """
    candidates = [path for path in list_checkpoints(run_dir) if max_step is None or get_step(path) <= max_step]
    skipped = []
    for checkpoint in reversed(candidates):
        try:
            verify(checkpoint, checksums=checksums)
            break
        except CheckpointError as error:
            skipped.append((checkpoint, error))
    else:
        renamed = list((run_dir / CHECKPOINTS_FOLDER).glob(f"{DAMAGED_PREFIX}*")) if max_step is None else []
        if count := len(candidates) + len(renamed):
            what = f"all {count} checkpoints are damaged" if count > 1 else "the only checkpoint is damaged"
            example = f" ({skipped[0][1]})" if skipped else ""
            raise CheckpointError(
                f"{run_dir}: {what}{example}. To start again from step 0, move {run_dir / CHECKPOINTS_FOLDER} away."
            )
        return None
    for damaged, why in skipped:
        target = rename_as_damaged(damaged) if rename_damaged else None
        warn(f"Skipped a damaged checkpoint: {why}." + (f" Renamed it to {target}." if target else ""))
    return checkpoint


def rename_as_damaged(checkpoint: Path) -> Path | None:
    """Rename a checkpoint to ``damaged-step-...``, so that no run resumes from it.

    Returns:
        The new path. ``None`` if the file system does not allow the rename.
    """
    for number in range(1000):
        target = checkpoint.with_name(f"{DAMAGED_PREFIX}{checkpoint.name}" + (f".{number}" if number else ""))
        if not target.exists():
            try:
                checkpoint.rename(target)
            except OSError:
                break
            return target
    return None


def locate_checkpoint(path: str | Path, warn: Callable[[str], None], *, checksums: bool = True) -> Path:
    """Return the checkpoint that a user means by a path, and verify it.

    Args:
        path: A run directory, which means its latest valid checkpoint, or the folder of a checkpoint.
        warn: Called with a message for each damaged checkpoint that is skipped.
        checksums: See :func:`scale_mae.checkpoint.verification.verify`.

    Raises:
        CheckpointError: The path does not exist, has no checkpoint, or the checkpoint is damaged.
    """
    path = Path(path)
    if (path / CHECKPOINTS_FOLDER).is_dir():
        checkpoint = find_latest_valid(path, warn, checksums=checksums)
        if checkpoint is None:
            raise CheckpointError(f"{path}: this run has no checkpoint yet. Wait for the first one, or give another run.")
        return checkpoint
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such run directory or checkpoint. Correct the path.")
    verify(path, checksums=checksums)
    return path


def start_verification(path: str | Path) -> Verification:
    """Locate a checkpoint by comparing sizes only, and start to compute its checksums in the background.

    Args:
        path: See :func:`locate_checkpoint`.

    Raises:
        CheckpointError: See :func:`locate_checkpoint`.
    """
    messages: list[str] = []
    return Verification(locate_checkpoint(path, messages.append, checksums=False), messages)
