"""The result of a training call."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainingResult:
    """The result of :func:`scale_mae.pretrain`, :func:`scale_mae.finetune` or :func:`scale_mae.linprobe`.

    Attributes:
        run_dir: Run directory.
        step: Optimizer steps done.
        finished: Whether the schedule is complete. If not, the same call continues the run.
        stopped: Why the run stopped early, such as ``stopped by SIGTERM after step 12``. Empty if it did not.
    """

    run_dir: Path
    step: int
    finished: bool
    stopped: str
