"""The learning rate as a pure function of the step: linear warm-up, then cosine decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scale_mae.config import Config, UserError


@dataclass(frozen=True)
class LRSchedule:
    """Linear warm-up from exactly 0, then half a cosine to ``min_lr``, per step.

    Attributes:
        peak_lr: learning rate at the end of the warm-up.
        min_lr: at the end of the schedule.
        warmup_steps: length of the warm-up.
        total_steps: length of the schedule, warm-up included.
    """

    peak_lr: float
    min_lr: float
    warmup_steps: int
    total_steps: int

    def lr(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        if step < self.warmup_steps:
            return self.peak_lr * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def build_schedule(config: Config, dataset_size: int) -> LRSchedule:
    """Learning-rate schedule in steps.

    Raises:
        UserError: a length of zero, or a warm-up longer than the run.
    """
    total = config.steps(config.train.duration, dataset_size)
    lengths = {"checkpoint.interval": config.checkpoint.interval, "classify.eval_interval": config.classify.eval_interval}
    if config.checkpoint.keep_interval:
        lengths["checkpoint.keep_interval"] = config.checkpoint.keep_interval
    for key, length in {"train.duration": config.train.duration, **lengths}.items():
        if config.steps(length, dataset_size) < 1:
            raise UserError(f"{key} is no step at all; give at least '1 steps'")
    warmup = config.steps(config.optim.warmup, dataset_size)
    if warmup > total:
        raise UserError(
            f"optim.warmup={config.optim.warmup} is {warmup} steps, more than train.duration={config.train.duration}, {total}"
        )
    return LRSchedule(config.peak_lr, config.optim.min_lr, warmup, total)
