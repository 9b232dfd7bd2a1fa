"""Builds the charts of a run from its log lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from scale_mae.report.chart import Chart, EventMarker, Series, Style
from scale_mae.report.log_lines import Floats, LogLines, column
from scale_mae.report.run_record import RunRecord

PHASES = {  # name of a phase -> log key
    "data loading": "data_loading_s",
    "forward and backward": "forward_backward_s",
    "optimizer": "optimizer_s",
    "checkpoint": "checkpoint_s",
    "evaluation": "evaluation_s",
}
PAUSE_PHASES = ("checkpoint", "evaluation")  # the logged step time does not contain them
CAUSE_PREFIX = "decode_failures_"


class RunCharts:
    """Builds the charts of a run. A chart without values in the log is omitted.

    Args:
        record: The run.
        markers: Events to draw in the loss chart.

    Attributes:
        missing: Titles of the omitted charts.
    """

    def __init__(self, record: RunRecord, markers: Sequence[EventMarker]) -> None:
        self._log, self._markers = record.log, markers
        self._images, self._steps = record.images(record.log.lines), record.log.column("step")
        self._record = record
        self.missing: list[str] = []

    def _series(self, name: str, values: Floats, style: Style = "line") -> Series:
        return Series(name, self._images, self._steps, values, style)

    def loss(self) -> list[Chart]:
        """Return the charts of the loss, learning rate, gradient norm, accuracy and loss scale."""
        smoothed, method = self._log.smoothed
        curves = [self._series("loss", self._log.column("loss"), "faint"), self._series("smoothed", smoothed)]
        caption = f"Loss of the logged steps, and {method}."
        if superseded := self._log.superseded:
            images, steps = self._record.images(superseded), column(superseded, "step")
            curves.append(Series("repeated later", images, steps, column(superseded, "loss"), "dots"))
            caption += " Dots are steps that the run repeated later, after a restart or a rollback."
        if self._markers:
            caption += " Vertical lines mark incidents. The section Incidents lists them."
        charts = [Chart("loss", "Loss", caption, "loss", curves, self._markers, log_scale=True)]
        caption = "Learning rate of each logged step."
        charts += self._simple("learning-rate", "Learning rate", caption, "rate", {"learning rate": "lr"})
        caption = "Global norm of the gradients before clipping."
        charts += self._simple("gradient-norm", "Gradient norm", caption, "norm", {"gradient norm": "grad_norm"})
        if self._log.has("val_top1"):
            caption = "Accuracy of the newest evaluation on classify.val_source."
            charts += self._simple("accuracy", "Accuracy", caption, "share", {"top-1": "val_top1", "top-5": "val_top5"})
        loss_scales = self._log.column("loss_scale")
        if len(set(loss_scales[np.isfinite(loss_scales)].tolist())) > 1:
            charts += self._simple("loss-scale", "Loss scale", "Loss scale of fp16.", "factor", {"loss scale": "loss_scale"})
        return charts

    def speed(self) -> list[Chart]:
        """Return the charts of the throughput, FLOP utilization, phases, and slowest and fastest rank."""
        caption = "Images per second of the whole run, without checkpoints and evaluations."
        charts = self._simple("throughput", "Throughput", caption, "images/s", {"images/s": "images_per_s"})
        caption = "Share of the peak FLOP/s of the devices: without recomputation (MFU) and with recomputation (HFU)."
        charts += self._simple("utilization", "FLOP utilization", caption, "share of peak", {"MFU": "mfu", "HFU": "hfu"})
        charts += self._phases()
        ranks = {"slowest": "slowest_rank_s", "fastest": "fastest_rank_s"}
        caption = "Time of a rank's own work in a step: data loading, copy to the device and forward pass."
        return charts + self._simple("ranks", "Slowest and fastest rank", caption, "seconds per step", ranks)

    def _phases(self) -> list[Chart]:
        times = phase_times(self._log)
        if not times:
            self.missing.append("Time by phase")
            return []
        curves = [self._series(name, values, "area") for name, values in times.items()]
        caption = "Mean time per step since the previous log line, stacked by phase."
        return [Chart("phases", "Time by phase", caption, "seconds per step", curves)]

    def memory(self) -> list[Chart]:
        """Return the chart of the memory."""
        keys = {
            "GPU, allocated": "gpu_memory_allocated_gib",
            "GPU, reserved": "gpu_memory_reserved_gib",
            "host, resident": "host_rss_gib",
            "peak of rank 0": "peak_memory_gib",
        }
        caption = (
            "Largest memory of any process: peak allocated on the GPU, reserved on the GPU by PyTorch, resident on the host. "
            "The peak of rank 0 is on its GPU, or resident on the host without a GPU."
        )
        return self._simple("memory", "Memory", caption, "GiB", keys)

    def failures(self) -> list[Chart]:
        """Return the chart of the decode failures; no chart without failures."""
        causes = failure_causes(self._log)
        if not any(self._log.last(key) for key in causes.values()):
            return []
        caption = "Replaced images since the first start, by cause."
        return self._simple("decode-failures", "Decode failures", caption, "images", causes)

    def _simple(self, name: str, title: str, caption: str, unit: str, keys: Mapping[str, str]) -> list[Chart]:
        """Return a chart with one curve per log key."""
        curves = [self._series(label, self._log.column(key)) for label, key in keys.items() if self._log.has(key)]
        if not curves:
            self.missing.append(title)
            return []
        return [Chart(name, title, caption, unit, curves)]


def phase_times(log: LogLines) -> dict[str, Floats]:
    """Return the seconds of each phase per step, ``[N]`` each. ``other`` is the rest. Empty if the log has no phases."""
    times = {name: log.column(key) for name, key in PHASES.items() if log.has(key)}
    if not np.nansum(times.get("evaluation", 0)):  # pre-training has no evaluation
        times.pop("evaluation", None)
    if not times or not log.has("step_time_s"):
        return {}
    known = sum((np.nan_to_num(values) for name, values in times.items() if name not in PAUSE_PHASES), np.zeros(len(log)))
    return {**times, "other": np.maximum(0.0, log.column("step_time_s") - known)}


def failure_causes(log: LogLines) -> dict[str, str]:
    """Return the causes of decode failures, with their log keys."""
    keys = {key for line in log.lines for key in line if key.startswith(CAUSE_PREFIX)}
    return {key.removeprefix(CAUSE_PREFIX).replace("_", " "): key for key in sorted(keys)}
