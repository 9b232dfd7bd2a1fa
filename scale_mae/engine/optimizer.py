"""The optimizer: which parameters decay, which learn slower, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from scale_mae.config import Config, UserError
from scale_mae.config.sections import OptimConfig
from scale_mae.engine.ema import EMA
from scale_mae.engine.lars import LARS, MOMENTUM
from scale_mae.engine.trainable import TrainableModule


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter has weight decay: all but biases and one-dimensional ones. Tokens, three-dimensional, decay,
    as in the reference."""
    return parameter.ndim > 1 and not name.endswith(".bias")


@dataclass(frozen=True)
class Group:
    """Parameters that are updated alike.

    Attributes:
        names: in the model's order.
        weight_decay: of all of them.
        lr_scale: their multiple of the learning rate.
    """

    names: list[str]
    weight_decay: float
    lr_scale: float


def parameter_groups(model: TrainableModule, config: OptimConfig) -> list[Group]:
    """Groups without weight decay, then those with it; of each kind, by multiple of the learning rate, in the model's order.

    A multiple is ``layer_decay`` to the power of the layers above (Bao et al. 2022, BEiT), times the model's own ``lr_scales``.
    """
    exempt, scales, depth = model.no_weight_decay(), model.lr_scales(), 0
    if config.layer_decay != 1:
        depth = sum(1 for _ in model.get_submodule("blocks").children())
    found: dict[bool, dict[float, list[str]]] = {False: {}, True: {}}
    for name, parameter in model.named_parameters():
        above = depth + 1 - _layer(name, depth)
        scale = config.layer_decay**above * scales.get(name, 1.0)
        decaying = decays(name, parameter) and name not in exempt
        found[decaying].setdefault(scale, []).append(name)
    return [
        Group(names, config.weight_decay if decaying else 0.0, scale)
        for decaying, by_scale in found.items()
        for scale, names in by_scale.items()
    ]


def _layer(name: str, depth: int) -> int:
    """0 for what makes tokens of an image, 1 for the first block, ``depth + 1`` for what follows the last."""
    first, _, rest = name.partition(".")
    if first in ("cls_token", "pos_embed", "patch_embed"):
        return 0
    return int(rest.split(".")[0]) + 1 if first == "blocks" else depth + 1


def build_optimizer(model: TrainableModule, config: OptimConfig, *, fused: bool = True) -> Optimizer:
    """AdamW or LARS over :func:`parameter_groups`; its learning rate is set before every step.

    Args:
        model: on its device.
        config: which one, and its settings.
        fused: AdamW's fused form.
    """
    groups = [
        {"params": [model.get_parameter(n) for n in g.names], "weight_decay": g.weight_decay, "lr_scale": g.lr_scale}
        for g in parameter_groups(model, config)
    ]
    if config.name == "lars":
        return LARS(groups, momentum=config.momentum, trust=config.trust_coefficient)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=fused)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Give every group of :func:`build_optimizer` its multiple of ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def states_kept(config: OptimConfig) -> tuple[str, ...]:
    """Names of the tensors, as large as the parameters, that the optimizer keeps beside them."""
    moments = (MOMENTUM,) if config.name == "lars" else ("exp_avg", "exp_avg_sq")
    return (*moments, EMA) if config.ema_decay else moments


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


def build_schedule(config: Config, dataset_size: int) -> Schedule:
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
    return Schedule(config.peak_lr, config.optim.min_lr, warmup, total)
