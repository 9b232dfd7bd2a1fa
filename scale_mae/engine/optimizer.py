"""The optimizer: AdamW or LARS over groups of parameters, which differ in weight decay and learning-rate multiplier."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from scale_mae.config.sections import OptimConfig
from scale_mae.engine.ema import EMA_KEY
from scale_mae.engine.lars import LARS, MOMENTUM
from scale_mae.engine.trainable import TrainableModule


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter has weight decay: all but biases and one-dimensional ones. Tokens, three-dimensional, decay,
    as in the reference."""
    return parameter.ndim > 1 and not name.endswith(".bias")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are updated alike.

    Attributes:
        names: in the model's order.
        weight_decay: of all of them.
        lr_scale: their multiple of the learning rate.
    """

    names: list[str]
    weight_decay: float
    lr_scale: float


def parameter_groups(model: TrainableModule, config: OptimConfig) -> list[ParameterGroup]:
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
        decaying = has_weight_decay(name, parameter) and name not in exempt
        found[decaying].setdefault(scale, []).append(name)
    return [
        ParameterGroup(names, config.weight_decay if decaying else 0.0, scale)
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


def optimizer_state_keys(config: OptimConfig) -> tuple[str, ...]:
    """Names of the tensors, as large as the parameters, that the optimizer keeps beside them."""
    moments = (MOMENTUM,) if config.name == "lars" else ("exp_avg", "exp_avg_sq")
    return (*moments, EMA_KEY) if config.ema_decay else moments
