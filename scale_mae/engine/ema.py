"""A moving average of the weights, kept beside the optimizer's moments: sharded, saved and resumed as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

EMA_KEY = "ema"  # its name in the optimizer's state


class WeightEMA:
    """After every update ``ema = decay * ema + (1 - decay) * weight``, from the weights before the first one.

    Args:
        optimizer: updates fp32 masters; a step that its ``found_inf`` leaves out changes no average either, without the host
            having to know.
        decay: in (0, 1).
    """

    def __init__(self, optimizer: Optimizer, decay: float) -> None:
        self._decay = decay
        self._first: dict[Tensor, Tensor] = {}
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        # to AdamW a state that is not empty is one that has its moments, so the average joins it after the step
        self._first = {p: p.detach().clone() for p in _updated(optimizer) if not optimizer.state[p]}

    @torch.no_grad()
    def _after(self, optimizer: Any, *_: Any) -> None:
        for p in _updated(optimizer):
            state = optimizer.state[p]
            if p in self._first:
                state[EMA_KEY] = self._first.pop(p)
            state[EMA_KEY].lerp_(p.detach(), (1 - self._decay) * (1 - optimizer.found_inf))


def _updated(optimizer: Optimizer) -> Iterator[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
