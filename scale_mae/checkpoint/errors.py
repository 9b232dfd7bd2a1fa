"""The error that every reader and writer of checkpoints raises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from scale_mae.config import UserError

T = TypeVar("T")


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, not supported, or does not match the model."""


def convert_os_errors(action: Callable[[], T], checkpoint: Path, written_to: Path | None = None) -> T:
    """Run ``action``, and raise its OSError as a CheckpointError, which fails the save of a checkpoint but not the run.

    Args:
        action: The action.
        checkpoint: Path of the checkpoint that is being saved.
        written_to: The path that ``action`` writes to, if it is outside of ``checkpoints/``.

    Raises:
        CheckpointError: ``action`` raised an OSError.
    """
    try:
        return action()
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        where = f"{written_to}: " if written_to else ""
        raise CheckpointError(f"{checkpoint}: not written ({where}{reason}). Earlier checkpoints are not affected.") from error
