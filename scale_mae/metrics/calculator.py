"""Computes the metrics of a log step: loss, throughput, phase times, FLOP utilization, slowest rank, and memory.

The keys are described in :mod:`scale_mae.metrics.log_keys`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from scale_mae.metrics.memory import MemoryUsage, max_memory, peak_memory_bytes
from scale_mae.metrics.step_timer import LOCAL_PHASES, PhaseSeconds, group_phases

Metrics = dict[str, int | float | None]
GIB = 2**30
SMOOTHING_STEPS = 100.0  # the weight of a loss in the smoothed loss falls to 1/e after this number of steps


class ProcessStats(NamedTuple):
    """Measurements of one process at a log step.

    Attributes:
        local_s: Seconds per step that it spends on its own work, without waiting for other ranks; see :data:`LOCAL_PHASES`.
        memory: Memory of the process.
        energy: Joules that its GPU used since the last log step; ``None`` if unknown.
    """

    local_s: float
    memory: MemoryUsage
    energy: float | None


@dataclass
class MetricsCalculator:
    """Turns counts and measured times into the metrics of one log line.

    Attributes:
        global_batch: Images per step.
        dataset_size: Images per epoch.
        world_size: Number of processes.
        flops_per_image: Floating-point operations of the forward and backward pass of one image.
        recomputed_flops_per_image: Operations that activation checkpointing executes again for one image.
        total_steps: Steps of the schedule.
        peak_flops: Peak operations per second of the device of one process; ``None`` if unknown.
        smoothed_loss: Loss averaged over about :data:`SMOOTHING_STEPS` steps. Checkpoints contain it.
        smoothed_step: Step of the last loss in that average.
    """

    global_batch: int
    dataset_size: int
    world_size: int
    flops_per_image: int
    recomputed_flops_per_image: int
    total_steps: int
    peak_flops: float | None = None
    smoothed_loss: float | None = None
    smoothed_step: int = 0

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint contains."""
        return {"smoothed_loss": self.smoothed_loss, "smoothed_step": self.smoothed_step}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue the average from a checkpoint. Without a state the average restarts."""
        self.smoothed_loss, self.smoothed_step = state.get("smoothed_loss"), int(state.get("smoothed_step", 0))

    def compute(
        self,
        step: int,
        loss: float,
        lr: float,
        grad_norm: float | None,
        loss_scale: float,
        step_times: Sequence[PhaseSeconds],
        process_stats: Sequence[ProcessStats],
    ) -> Metrics:
        """Return the metrics of the steps since the last log step.

        Args:
            step: Completed steps of the schedule.
            loss: Loss of the last step, averaged over its global batch.
            lr: Learning rate of the last step.
            grad_norm: Gradient norm of the last step before clipping.
            loss_scale: Loss scale of fp16; 1 for other precisions.
            step_times: Seconds by phase of each step since the last log step, on this process.
            process_stats: Measurements of all processes in rank order.
        """
        times = [group_phases(seconds) for seconds in step_times]
        mean = {group: sum(groups[group] for groups in times) / max(1, len(times)) for group in group_phases({})}
        images_per_s = self.global_batch / mean["step"]
        flops_per_s = images_per_s / self.world_size * self.flops_per_image
        mfu = None if self.peak_flops is None else flops_per_s / self.peak_flops
        return {
            "step": step,
            "total_steps": self.total_steps,
            "epoch": step * self.global_batch / self.dataset_size,
            "images": step * self.global_batch,
            "loss": loss if math.isfinite(loss) else None,
            "loss_smoothed": self._smooth(step, loss),
            "lr": lr,
            "grad_norm": grad_norm,
            "images_per_s": images_per_s,
            "step_time_s": mean.pop("step"),
            **{f"{group}_s": seconds for group, seconds in mean.items()},
            "tflops_per_rank": flops_per_s / 1e12,
            "mfu": mfu,
            "hfu": None if mfu is None else mfu * (1 + self.recomputed_flops_per_image / self.flops_per_image),
            **_slowest_and_fastest([stats.local_s for stats in process_stats]),
            **memory_metrics([stats.memory for stats in process_stats]),
            "peak_memory_gib": peak_memory_bytes() / GIB,
            "loss_scale": loss_scale,
            "eta_s": (self.total_steps - step) * self.global_batch / images_per_s,
            "time": time.time(),
        }

    def _smooth(self, step: int, loss: float) -> float | None:
        """Return the exponential moving average. The weight of a loss grows with the steps since the previous one."""
        if math.isfinite(loss):
            decay = math.exp(-max(1, step - self.smoothed_step) / SMOOTHING_STEPS)
            self.smoothed_loss = loss if self.smoothed_loss is None else decay * self.smoothed_loss + (1 - decay) * loss
            self.smoothed_step = step
        return self.smoothed_loss


def local_seconds(step_times: Sequence[PhaseSeconds]) -> float:
    """Return the mean seconds per step that this process spends on its own work, without waiting for other ranks."""
    return sum(seconds.get(phase, 0.0) for seconds in step_times for phase in LOCAL_PHASES) / max(1, len(step_times))


def _slowest_and_fastest(local_s: Sequence[float]) -> Metrics:
    slowest, fastest = local_s.index(max(local_s)), local_s.index(min(local_s))
    return {
        "slowest_rank": slowest,
        "slowest_rank_s": local_s[slowest],
        "fastest_rank": fastest,
        "fastest_rank_s": local_s[fastest],
    }


def memory_metrics(processes: Sequence[MemoryUsage]) -> Metrics:
    """Return the largest value of each kind of memory among the processes, in GiB."""
    largest = max_memory(processes)
    return {
        "gpu_memory_allocated_gib": None if largest.gpu_allocated is None else largest.gpu_allocated / GIB,
        "gpu_memory_reserved_gib": None if largest.gpu_reserved is None else largest.gpu_reserved / GIB,
        "host_rss_gib": largest.host_rss / GIB,
    }
