"""The optimizer: AdamW or LARS over groups of parameters, which differ in weight decay and learning-rate multiplier."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from scale_mae.config.schema import OptimConfig
from scale_mae.engine.ema import EMA_KEY
from scale_mae.engine.lars import LARS, MOMENTUM_KEY
from scale_mae.engine.trainable import TrainableModule


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with the same weight decay and learning-rate multiplier.

    Attributes:
        names: Names of the parameters, in the model's order.
        weight_decay: Their weight decay.
        lr_scale: Their multiplier of the learning rate.
    """

    names: list[str]
    weight_decay: float
    lr_scale: float


def build_parameter_groups(model: TrainableModule, config: OptimConfig) -> list[ParameterGroup]:
    """Return the groups without weight decay, then those with it. Within each kind, groups follow the model's order.

    The learning-rate multiplier of a parameter is ``layer_decay`` to the power of the number of layers above it (Bao et
    al. 2022, BEiT), times the model's ``lr_scales``.
    """
    exempt, lr_scales, depth = model.no_weight_decay(), model.lr_scales(), 0
    if config.layer_decay != 1:
        depth = sum(1 for _ in model.get_submodule("blocks").children())
    names: dict[bool, dict[float, list[str]]] = {False: {}, True: {}}  # by weight decay, then by multiplier
    for name, parameter in model.named_parameters():
        layers_above = depth + 1 - _layer_number(name, depth)
        lr_scale = config.layer_decay**layers_above * lr_scales.get(name, 1.0)
        decays = has_weight_decay(name, parameter) and name not in exempt
        names[decays].setdefault(lr_scale, []).append(name)
    return [
        ParameterGroup(group_names, config.weight_decay if decays else 0.0, lr_scale)
        for decays, names_by_scale in names.items()
        for lr_scale, group_names in names_by_scale.items()
    ]


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter has weight decay: all except biases and one-dimensional parameters.

    Class and mask tokens have three dimensions, so they have weight decay, as in the reference implementation.
    """
    return parameter.ndim > 1 and not name.endswith(".bias")


def _layer_number(name: str, depth: int) -> int:
    """Return 0 for the patch embedding and the class token, 1 for the first block, ``depth + 1`` after the last block."""
    module, _, rest = name.partition(".")
    if module in ("cls_token", "pos_embed", "patch_embed"):
        return 0
    return int(rest.split(".")[0]) + 1 if module == "blocks" else depth + 1


def build_optimizer(model: TrainableModule, config: OptimConfig, *, fused: bool = True) -> Optimizer:
    """Build AdamW or LARS over :func:`build_parameter_groups`. Its learning rate is 0 until :func:`set_lr` is called.

    Args:
        model: The model on its device.
        config: The optimizer section of the config.
        fused: Whether to use AdamW's fused implementation.
    """
    groups = [
        {
            "params": [model.get_parameter(name) for name in group.names],
            "weight_decay": group.weight_decay,
            "lr_scale": group.lr_scale,
        }
        for group in build_parameter_groups(model, config)
    ]
    if config.name == "lars":
        return LARS(groups, momentum=config.momentum, trust_coefficient=config.trust_coefficient)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=fused)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of each group of :func:`build_optimizer` to ``lr`` times the group's multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def get_optimizer_state_keys(config: OptimConfig) -> tuple[str, ...]:
    """Return the keys of the optimizer's states that have the shape of the parameter."""
    moments = (MOMENTUM_KEY,) if config.name == "lars" else ("exp_avg", "exp_avg_sq")
    return (*moments, EMA_KEY) if config.ema_decay else moments
