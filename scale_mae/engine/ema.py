"""An exponential moving average (EMA) of the weights in the optimizer's state: sharded, saved and resumed like its moments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

EMA_KEY = "ema"  # key in the optimizer's state of a parameter


class WeightEMA:
    """Update ``ema = decay * ema + (1 - decay) * weight`` after every optimizer step. The EMA starts at the initial weights.

    Args:
        optimizer: Updates fp32 master weights. A step that it skips because of ``found_inf`` leaves the EMA unchanged;
            the host does not read ``found_inf``.
        decay: In (0, 1).
    """

    def __init__(self, optimizer: Optimizer, decay: float) -> None:
        self._decay = decay
        self._initial: dict[Tensor, Tensor] = {}
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        # AdamW creates its moments only if the state is empty, so the EMA enters the state after the first step
        self._initial = {p: p.detach().clone() for p in _updated_parameters(optimizer) if not optimizer.state[p]}

    @torch.no_grad()
    def _after_step(self, optimizer: Any, *_: Any) -> None:
        for p in _updated_parameters(optimizer):
            state = optimizer.state[p]
            if p in self._initial:
                state[EMA_KEY] = self._initial.pop(p)
            state[EMA_KEY].lerp_(p.detach(), (1 - self._decay) * (1 - optimizer.found_inf))


def _updated_parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
