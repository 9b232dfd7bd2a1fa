"""LARS: momentum whose step is measured by the weights of each layer, for large batches on few parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

MOMENTUM = "momentum_buffer"


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, algorithm 1, with the learning rate outside the momentum).

        d = g + weight_decay * p;  d *= trust * |p| / |d|;  mu = momentum * mu + d;  p -= lr * mu

    One-dimensional parameters have no weight decay and no trust ratio; where a norm is 0, the ratio is 1. Parameters must be
    whole, so that their norms are those of layers.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        momentum: of the update.
        trust: coefficient of the trust ratio.
        weight_decay: added to the gradient.

    Attributes:
        found_inf: not 0: the next steps change nothing, as with PyTorch's fused optimizers; a float on the device, never read
            by the host.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": weight_decay})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient; ``closure`` is not called."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"], state[MOMENTUM] = torch.zeros((), device=p.device), torch.zeros_like(p)
        d = p.grad
        assert d is not None
        if p.ndim > 1:
            d = d.add(p, alpha=group["weight_decay"])
            weight, update = p.norm(), d.norm()
            d = d * torch.where((weight > 0) & (update > 0), group["trust"] * weight / update, 1.0)
        skipped = torch.zeros((), device=p.device) if self.found_inf is None else self.found_inf.to(p.device)
        mu = state[MOMENTUM]
        mu.copy_(torch.where(skipped > 0, mu, group["momentum"] * mu + d))
        p.add_(torch.where(skipped > 0, torch.zeros_like(mu), mu), alpha=-group["lr"])
        state["step"] += 1 - skipped
