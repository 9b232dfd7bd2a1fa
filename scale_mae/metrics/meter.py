"""What a run measures: computed here once a log step, printed elsewhere."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field

import torch

Metrics = dict[str, int | float | None]


@dataclass
class Meter:
    """Turns counts and clock readings into the metrics of one log line.

    Attributes:
        global_batch: images of one step.
        dataset_size: images of one epoch.
        processes: that share the work.
        flops_per_image: operations of one image, forward and backward.
        total_steps: of the schedule.
    """

    global_batch: int
    dataset_size: int
    processes: int
    flops_per_image: int
    total_steps: int
    _since: float = field(default_factory=time.perf_counter)
    _steps: int = 0
    _data_wait: float = 0.0

    def waited_for_data(self, seconds: float) -> None:
        """Add time in which the process had nothing to compute on."""
        self._data_wait += seconds

    def stepped(self) -> None:
        """Count a step."""
        self._steps += 1

    def pause(self, seconds: float) -> None:
        """Leave ``seconds`` (of saving, say) out of the speed."""
        self._since += seconds

    def read(
        self, step: int, loss: float, lr: float, grad_norm: float | None, loss_scale: float, skipped_steps: int
    ) -> Metrics:
        """Metrics of the stretch since the last reading, and start a new one.

        Args:
            step: steps done since the start of the schedule.
            loss: of the last step's global batch.
            lr: learning rate of the last step.
            grad_norm: of the last step, before clipping.
            loss_scale: of fp16, else 1.
            skipped_steps: left out so far, because gradients were not finite.
        """
        now = time.perf_counter()
        step_time = (now - self._since) / max(1, self._steps)
        images_per_s = self.global_batch / step_time
        metrics: Metrics = {
            "step": step,
            "total_steps": self.total_steps,
            "epoch": step * self.global_batch / self.dataset_size,
            "images": step * self.global_batch,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "images_per_s": images_per_s,
            "step_time_s": step_time,
            "data_wait_s": self._data_wait / max(1, self._steps),
            "tflops_per_process": images_per_s * self.flops_per_image / self.processes / 1e12,
            "memory_gib": peak_memory() / 2**30,
            "loss_scale": loss_scale,
            "skipped_steps": skipped_steps,
            "time_left_s": (self.total_steps - step) * step_time,
            "time": time.time(),
        }
        self._since, self._steps, self._data_wait = now, 0, 0.0
        return metrics


def peak_memory() -> int:
    """Largest memory so far in bytes: allocated on the GPU, or resident in the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
