"""The LARS optimizer: momentum with a learning rate per layer, for large batches and few parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

MOMENTUM_KEY = "momentum_buffer"  # key in the optimizer's state of a parameter


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, algorithm 1, with the learning rate outside the momentum).

        d = g + weight_decay * p;  d *= trust_coefficient * |p| / |d|;  mu = momentum * mu + d;  p -= lr * mu

    One-dimensional parameters have no weight decay and no trust ratio. The trust ratio is 1 if one of its norms is 0.
    ZeRO must not partition the parameters, because the norms are those of whole layers.

    Args:
        params: Parameters, or groups of parameters.
        lr: Learning rate.
        momentum: Momentum of the update.
        trust_coefficient: Factor of the trust ratio.
        weight_decay: Weight decay that is added to the gradient.

    Attributes:
        found_inf: If it is not 0, steps change nothing, as with PyTorch's fused optimizers. A float scalar on the device,
            which the host does not read.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "trust_coefficient": trust_coefficient, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient. ``closure`` is not called."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"], state[MOMENTUM_KEY] = torch.zeros((), device=p.device), torch.zeros_like(p)
        d = p.grad
        assert d is not None
        if p.ndim > 1:
            d = d.add(p, alpha=group["weight_decay"])
            p_norm, d_norm = p.norm(), d.norm()
            d = d * torch.where((p_norm > 0) & (d_norm > 0), group["trust_coefficient"] * p_norm / d_norm, 1.0)
        skip = torch.zeros((), device=p.device) if self.found_inf is None else self.found_inf.to(p.device)
        mu = state[MOMENTUM_KEY]
        mu.copy_(torch.where(skip > 0, mu, group["momentum"] * mu + d))
        p.add_(torch.where(skip > 0, torch.zeros_like(mu), mu), alpha=-group["lr"])
        state["step"] += 1 - skip
