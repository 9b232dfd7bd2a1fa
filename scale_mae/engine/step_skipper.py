"""A step whose gradients are not finite changes nothing: no weight, no moment, no count of steps, on any process.

DeepSpeed leaves such steps out in fp16, and elsewhere where it looks at the norm anyway; in bf16 under ZeRO-1 and 2 the host
would have to wait in every step. PyTorch's fused AdamW, and LARS here, take the decision as a tensor instead, which the host
never reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class StepSkipper:
    """Stands between DeepSpeed and the optimizer.

    Args:
        optimizer: the one that DeepSpeed calls, after it has the norm; it heeds ``found_inf``, as PyTorch's fused ones do.
        norm: the global gradient norm, the same on every process.
        device: of the accelerator.

    Attributes:
        skipped: 1 when the last step was left out, else 0; a float on the device.
        total: steps left out so far; likewise.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, norm: Callable[[], Any], device: torch.device) -> None:
        self._optimizer, self._norm, self._device = optimizer, norm, device
        self.skipped = torch.zeros((), device=device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        optimizer.register_step_pre_hook(self._decide)

    def _decide(self, optimizer: Any, *_: object) -> None:
        norm = torch.as_tensor(self._norm())
        bad = (~(norm.isfinite() & (norm >= 0))).float()  # to DeepSpeed, -1 is a norm that is none
        # Masters in host memory are updated there, and must not be before the decision has arrived. DeepSpeed has waited for
        # their gradients anyway.
        holder = next(p for group in optimizer.param_groups for p in group["params"])
        optimizer.found_inf = bad.to(holder.device)

    def stepped(self, overflow: bool) -> None:
        """Count; after each update.

        Args:
            overflow: DeepSpeed has left this one out itself.
        """
        self.skipped = torch.ones_like(self.skipped) if overflow else self._optimizer.found_inf.to(self._device)  # type: ignore[attr-defined]
        self.total += self.skipped
