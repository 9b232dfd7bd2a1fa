"""Skip steps whose gradients are not finite: no weight, moment or step count changes on any process.

DeepSpeed skips such steps in fp16, and in other precisions where it reads the gradient norm anyway. In bf16 with ZeRO-1
and ZeRO-2, its check would make the host wait in every step. PyTorch's fused AdamW and this project's LARS take the
decision as a tensor, ``found_inf``, which the host never reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class StepSkipper:
    """Set the optimizer's ``found_inf`` before every step, and count the steps that are skipped.

    Args:
        optimizer: The optimizer that DeepSpeed calls after it has computed the norm. It must skip a step if its
            ``found_inf`` is not 0, as PyTorch's fused optimizers do.
        norm: Returns the global gradient norm, the same on all processes.
        device: The accelerator.

    Attributes:
        skipped: 1 if the last step was skipped, else 0; a float scalar on the device.
        total: The number of skipped steps so far; a float scalar on the device.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, norm: Callable[[], Any], device: torch.device) -> None:
        self._optimizer, self._norm, self._device = optimizer, norm, device
        self.skipped = torch.zeros((), device=device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        optimizer.register_step_pre_hook(self._set_found_inf)

    def _set_found_inf(self, optimizer: Any, *_: object) -> None:
        norm = torch.as_tensor(self._norm())
        found_inf = (~(norm.isfinite() & (norm >= 0))).float()  # DeepSpeed returns -1 for a norm that is not finite
        # With optimizer offload, the master weights are updated in host memory, which must wait for the decision.
        # DeepSpeed has already waited for their gradients.
        master = next(p for group in optimizer.param_groups for p in group["params"])
        optimizer.found_inf = found_inf.to(master.device)

    def count_step(self, overflow: bool) -> None:
        """Update ``skipped`` and ``total``. Call this after every optimizer step.

        Args:
            overflow: Whether DeepSpeed skipped the step itself.
        """
        self.skipped = torch.ones_like(self.skipped) if overflow else self._optimizer.found_inf.to(self._device)  # type: ignore[attr-defined]
        self.total += self.skipped
