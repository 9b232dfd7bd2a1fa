"""The optimizer: which parameters decay, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from scale_mae.config import Config, UserError
from scale_mae.sections import OptimConfig


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter has weight decay: all but biases and one-dimensional ones. Tokens, three-dimensional, decay,
    as in the reference."""
    return parameter.ndim > 1 and not name.endswith(".bias")


def parameter_names(model: nn.Module) -> list[list[str]]:
    """Names in two groups, without and with decay, each in the model's order."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [[n for n, p in named if decays(n, p) == wanted] for wanted in (False, True)]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The groups of :func:`parameter_names` as an optimizer takes them."""
    without, with_decay = ([model.get_parameter(n) for n in names] for names in parameter_names(model))
    return [{"params": without, "weight_decay": 0.0}, {"params": with_decay, "weight_decay": weight_decay}]


def build_adamw(model: nn.Module, config: OptimConfig, *, fused: bool = True) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`; its learning rate is set before every step."""
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=fused)


@dataclass(frozen=True)
class Schedule:
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


def make_schedule(config: Config, dataset_size: int) -> Schedule:
    """Learning-rate schedule in steps.

    Raises:
        UserError: a length of zero, or a warm-up longer than the run.
    """
    total = config.steps(config.train.duration, dataset_size)
    for key, steps in (("train.duration", total), ("checkpoint.every", config.steps(config.checkpoint.every, dataset_size))):
        if steps < 1:
            raise UserError(f"{key} is no step at all; give at least '1 steps'")
    warmup = config.steps(config.optim.warmup, dataset_size)
    if warmup > total:
        raise UserError(
            f"optim.warmup={config.optim.warmup} is {warmup} steps, more than train.duration={config.train.duration}, {total}"
        )
    return Schedule(config.peak_lr, config.optim.min_lr, warmup, total)
