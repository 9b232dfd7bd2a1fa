"""Names and paths of checkpoints in a run directory.

    checkpoints/step-00000100/           a checkpoint: manifest.json  config.yaml  latest  deepspeed/*.pt
    checkpoints/damaged-step-00000080/   a checkpoint that no run resumes from: it is damaged, or a rollback discarded it
    checkpoints/latest                   name of the newest checkpoint, for people and scripts; scale_mae does not read it

A folder in ``checkpoints/`` whose name starts with a dot is being written or deleted.
"""

from __future__ import annotations

import re
from pathlib import Path

CHECKPOINTS_FOLDER = "checkpoints"
STEP_PREFIX = "step-"
DAMAGED_PREFIX = "damaged-"
DEEPSPEED_TAG = "deepspeed"  # the folder of DeepSpeed's files inside a checkpoint
MANIFEST_FILE = "manifest.json"


def format_checkpoint_name(step: int) -> str:
    """Return the folder name of a checkpoint, such as ``step-00000100``."""
    return f"{STEP_PREFIX}{step:08d}"


def get_step(checkpoint: Path) -> int:
    """Return the step of a checkpoint, read from its folder name."""
    return int(checkpoint.name.removeprefix(STEP_PREFIX))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the committed checkpoints of a run, oldest first. Their contents are not checked."""
    paths = (run_dir / CHECKPOINTS_FOLDER).glob(f"{STEP_PREFIX}*")
    return sorted(path for path in paths if path.is_dir() and is_checkpoint_name(path.name))


def is_checkpoint_name(name: str) -> bool:
    """Return whether a folder name is that of a checkpoint."""
    return re.fullmatch(rf"{STEP_PREFIX}\d+", name, re.ASCII) is not None


def is_checkpoints_folder(path: Path) -> bool:
    """Return whether a path is the ``checkpoints`` folder of a run and contains a checkpoint."""
    return path.name == CHECKPOINTS_FOLDER and path.is_dir() and bool(list_checkpoints(path.parent))


def is_run_or_checkpoint(path: Path) -> bool:
    """Return whether scale_mae wrote a folder: a run directory, its ``checkpoints`` folder, or a checkpoint.

    A checkpoint counts even if it is damaged and has lost its manifest.
    """
    if (path / CHECKPOINTS_FOLDER).is_dir() or (path / MANIFEST_FILE).is_file() or is_checkpoints_folder(path):
        return True
    has_name = is_checkpoint_name(path.name.removeprefix(DAMAGED_PREFIX).partition(".")[0])
    return (path / DEEPSPEED_TAG).is_dir() and (has_name or (path / "config.yaml").is_file())
