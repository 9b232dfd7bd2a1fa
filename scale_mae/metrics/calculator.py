"""What a run measures: computed here once a log step, printed elsewhere."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from scale_mae.metrics.hardware import MemoryUsage
from scale_mae.metrics.step_timer import LOCAL_PHASES, PhaseSeconds, group_phases

Metrics = dict[str, int | float | None]
SMOOTHING = 100.0  # steps after which a loss has 1/e of its weight left in the smoothed one


class ProcessStats(NamedTuple):
    """What each process tells of itself at a log step.

    Attributes:
        own_s: seconds a step that it took for what it does without waiting for others; see :data:`LOCAL_PHASES`.
        memory: of the process.
        energy: joules that its GPU used since the last time; None where that is not known.
    """

    local_s: float
    memory: MemoryUsage
    energy: float | None


@dataclass
class MetricsCalculator:
    """Turns counts and clock readings into the metrics of one log line.

    Attributes:
        global_batch: images of one step.
        dataset_size: images of one epoch.
        processes: that share the work.
        flops_per_image: operations of one image, forward and backward.
        recomputed_per_image: of them, those done once more to save memory.
        total_steps: of the schedule.
        peak: operations a second that the device of one process could do; None: not known.
        smoothed: loss averaged over about :data:`SMOOTHING` steps; travels in checkpoints.
        smoothed_at: its step.
    """

    global_batch: int
    dataset_size: int
    processes: int
    flops_per_image: int
    recomputed_per_image: int
    total_steps: int
    peak: float | None = None
    smoothed: float | None = None
    smoothed_at: int = 0

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Average on from a checkpoint; one of a version that kept no average begins anew."""
        self.smoothed, self.smoothed_at = saved.get("smoothed"), int(saved.get("smoothed_at", 0))

    def compute(
        self,
        step: int,
        loss: float,
        lr: float,
        grad_norm: float | None,
        loss_scale: float,
        laps: Sequence[PhaseSeconds],
        vitals: Sequence[ProcessStats],
    ) -> Metrics:
        """Metrics of a stretch of steps.

        Args:
            step: steps done since the start of the schedule.
            loss: of the last step's global batch.
            lr: learning rate of the last step.
            grad_norm: of the last step, before clipping.
            loss_scale: of fp16, else 1.
            laps: of this process in each step of the stretch.
            vitals: of all processes, in rank order.
        """
        parts = [group_phases(step_laps) for step_laps in laps]
        mean = {name: sum(part[name] for part in parts) / max(1, len(parts)) for name in group_phases({})}
        images_per_s = self.global_batch / mean["step"]
        flops_per_s = images_per_s / self.processes * self.flops_per_image
        share = None if self.peak is None else flops_per_s / self.peak
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
            **{f"{name}_s": seconds for name, seconds in mean.items()},
            "tflops_per_process": flops_per_s / 1e12,
            "mfu": share,
            "hfu": None if share is None else share * (1 + self.recomputed_per_image / self.flops_per_image),
            **_ranks(vitals),
            "memory_gib": peak_memory_bytes() / 2**30,
            "loss_scale": loss_scale,
            "eta_s": (self.total_steps - step) * self.global_batch / images_per_s,
            "time": time.time(),
        }

    def _smooth(self, step: int, loss: float) -> float | None:
        """An exponential average in which a loss counts for the steps since the one before it."""
        if math.isfinite(loss):
            old = math.exp(-max(1, step - self.smoothed_at) / SMOOTHING)
            self.smoothed = loss if self.smoothed is None else old * self.smoothed + (1 - old) * loss
            self.smoothed_at = step
        return self.smoothed


def local_seconds(laps: Sequence[PhaseSeconds]) -> float:
    """Seconds a step that this process took without waiting for others."""
    return sum(step.get(name, 0.0) for step in laps for name in LOCAL_PHASES) / max(1, len(laps))


def _ranks(vitals: Sequence[ProcessStats]) -> Metrics:
    """The slowest and the fastest process, and the most memory that any has."""
    own = [vital.local_s for vital in vitals]
    slowest, fastest = own.index(max(own)), own.index(min(own))
    return {
        "slowest_rank": slowest,
        "slowest_rank_s": own[slowest],
        "fastest_rank": fastest,
        "fastest_rank_s": own[fastest],
        **max_memory([vital.memory for vital in vitals]),
    }


def max_memory(processes: Sequence[MemoryUsage]) -> Metrics:
    """The most of each kind of memory that any of these processes has, in GiB."""
    found: Metrics = {}
    for key, field in {
        "memory_allocated_gib": "allocated",
        "memory_reserved_gib": "reserved",
        "host_rss_gib": "host_rss",
    }.items():
        known = [value for process in processes if (value := getattr(process, field)) is not None]
        found[key] = max(known) / 2**30 if known else None
    return found


def peak_memory_bytes() -> int:
    """Largest memory so far in bytes: allocated on the GPU, or resident in the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
