"""The charts of a run, made from its log lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from scale_mae.report.charts import Chart, Mark, Series, Style
from scale_mae.report.record import Floats, Lines, Record, column

PHASES = {  # of a step, and what its time is called in the log
    "data wait": "data_loading_s",
    "forward and backward": "forward_backward_s",
    "optimizer": "optimizer_s",
    "checkpoint": "checkpoint_s",
    "evaluation": "evaluation_s",
}
STILL = ("checkpoint", "evaluation")  # no parts of a step's time in the log
CAUSE = "decode_failures_"


class Curves:
    """Charts of one record; those whose numbers are not in the log are left out and named in ``missing``.

    Args:
        record: the run.
        marks: what happened to it.
    """

    def __init__(self, record: Record, marks: Sequence[Mark]) -> None:
        self._log, self._marks = record.log, marks
        self._images, self._steps = record.images(record.log.lines), record.log.column("step")
        self._record = record
        self.missing: list[str] = []

    def _series(self, name: str, values: Floats, style: Style = "line") -> Series:
        return Series(name, self._images, self._steps, values, style)

    def loss(self) -> list[Chart]:
        """Loss, raw and smoothed, with everything that happened; learning rate; gradient norm; loss scale."""
        smoothed, how = self._log.smoothed
        curves = [self._series("loss", self._log.column("loss"), "faint"), self._series("smoothed", smoothed)]
        words = f"Loss of the logged steps, and {how}."
        if back := self._log.taken_back:
            place, steps = self._record.images(back), column(back, "step")
            curves.append(Series("done again later", place, steps, column(back, "loss"), "dots"))
            words += " Dots: steps that were done again, after a restart or a rollback."
        if self._marks:
            words += " Vertical lines: restarts, rollbacks and skipped steps, all listed under Incidents."
        charts = [Chart("loss", "Loss", words, "loss", curves, self._marks, log_scale=True)]
        charts += self._simple("learning-rate", "Learning rate", "Of each logged step.", "rate", {"learning rate": "lr"})
        words = "Over all parameters, before clipping."
        charts += self._simple("gradient-norm", "Gradient norm", words, "norm", {"gradient norm": "grad_norm"})
        if self._log.has("val_top1"):
            words = "On classify.val_source, of the newest evaluation at each logged step."
            charts += self._simple("accuracy", "Accuracy", words, "share", {"top-1": "val_top1", "top-5": "val_top5"})
        if len(set(self._log.column("loss_scale")[np.isfinite(self._log.column("loss_scale"))].tolist())) > 1:
            charts += self._simple("loss-scale", "Loss scale", "Of fp16.", "factor", {"loss scale": "loss_scale"})
        return charts

    def speed(self) -> list[Chart]:
        """Throughput, use of the device, the parts of a step, slowest and fastest process."""
        words = "Images a second of all processes together, saves left out."
        charts = self._simple("throughput", "Throughput", words, "images/s", {"images/s": "images_per_s"})
        words = "Operations of the model (MFU), and with recomputation (HFU), over what the device can do at its peak."
        charts += self._simple("utilisation", "Use of the device", words, "share of peak", {"MFU": "mfu", "HFU": "hfu"})
        charts += self._phases()
        ranks = {"slowest": "slowest_rank_s", "fastest": "fastest_rank_s"}
        words = "Its own work in a step, waiting for data and the forward pass, on the slowest and on the fastest process."
        return charts + self._simple("ranks", "Slowest and fastest process", words, "seconds a step", ranks)

    def _phases(self) -> list[Chart]:
        times = phase_times(self._log)
        if not times:
            self.missing.append("Where time went")
            return []
        curves = [self._series(name, values, "area") for name, values in times.items()]
        words = "Parts of a step, stacked: means since the log line before."
        return [Chart("phases", "Where time went", words, "seconds a step", curves)]

    def memory(self) -> list[Chart]:
        """Memory."""
        keys = {
            "allocated": "gpu_memory_allocated_gib",
            "reserved": "gpu_memory_reserved_gib",
            "host, resident": "host_rss_gib",
            "peak of the first process": "peak_memory_gib",
        }
        words = (
            "The most of any process: allocated on its device so far, reserved by torch, resident on the host. "
            "Peak of the first process: on its device, or resident where there is none."
        )
        return self._simple("memory", "Memory", words, "GiB", keys)

    def failures(self) -> list[Chart]:
        """Decode failures by cause."""
        causes = failure_causes(self._log)
        if not any(self._log.last(key) for key in causes.values()):
            return []
        words = "Images that were replaced so far, by cause."
        return self._simple("decode-failures", "Decode failures", words, "images", causes)

    def _simple(self, name: str, title: str, caption: str, unit: str, keys: Mapping[str, str]) -> list[Chart]:
        curves = [self._series(label, self._log.column(key)) for label, key in keys.items() if self._log.has(key)]
        if not curves:
            self.missing.append(title)
            return []
        return [Chart(name, title, caption, unit, curves)]


def phase_times(log: Lines) -> dict[str, Floats]:
    """Seconds of each part of a step, ``[N]`` each; ``other`` is what is left. Empty where the log tells none."""
    found = {name: log.column(key) for name, key in PHASES.items() if log.has(key)}
    if not np.nansum(found.get("evaluation", 0)):  # pre-training has none
        found.pop("evaluation", None)
    if not found or not log.has("step_time_s"):
        return {}
    of_step = sum((np.nan_to_num(values) for name, values in found.items() if name not in STILL), np.zeros(len(log)))
    return {**found, "other": np.maximum(0.0, log.column("step_time_s") - of_step)}


def failure_causes(log: Lines) -> dict[str, str]:
    """Causes of decode failures in words, and their keys."""
    keys = {key for line in log.lines for key in line if key.startswith(CAUSE)}
    return {key.removeprefix(CAUSE).replace("_", " "): key for key in sorted(keys)}
