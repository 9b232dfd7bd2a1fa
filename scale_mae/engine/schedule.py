"""The learning-rate schedule: a pure function of the step, with a linear warm-up and a cosine decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scale_mae.config import Config, UserError


@dataclass(frozen=True)
class LRSchedule:
    """A linear warm-up from exactly 0 to ``peak_lr``, then half a cosine to ``min_lr``, per step.

    Attributes:
        peak_lr: Learning rate at the end of the warm-up.
        min_lr: Learning rate at the end of the schedule.
        warmup_steps: Length of the warm-up.
        total_steps: Length of the schedule, including the warm-up.
    """

    peak_lr: float
    min_lr: float
    warmup_steps: int
    total_steps: int

    def lr(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.peak_lr * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def build_schedule(config: Config, dataset_size: int) -> LRSchedule:
    """Convert the durations of a config to steps and return the learning-rate schedule.

    Raises:
        UserError: The run or an interval has less than one step, or the warm-up is longer than the run.
    """
    _check_durations(config, dataset_size)
    total = config.steps(config.train.duration, dataset_size)
    warmup = config.steps(config.optim.warmup, dataset_size)
    if warmup > total:
        raise UserError(
            f"optim.warmup={config.optim.warmup} is {warmup} steps, but train.duration={config.train.duration} is only "
            f"{total}. Shorten the warm-up."
        )
    return LRSchedule(config.peak_lr, config.optim.min_lr, warmup, total)


def _check_durations(config: Config, dataset_size: int) -> None:
    durations = {
        "train.duration": config.train.duration,
        "checkpoint.interval": config.checkpoint.interval,
        "classify.eval_interval": config.classify.eval_interval,
        "checkpoint.keep_interval": config.checkpoint.keep_interval,
    }
    for key, duration in durations.items():
        if duration and config.steps(duration, dataset_size) < 1:
            raise UserError(f"{key}={duration} is 0 steps. Set {key} to at least '1 steps'.")
