"""The Prometheus metrics of a run: a table of all of them, and the code that fills them with values.

To add a metric that a log line already contains, add a row with that log key. Other metrics need a value in
:func:`node_families` or :func:`run_families`. The reference pages are generated from the two tables.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric

from scale_mae.metrics.calculator import Metrics
from scale_mae.metrics.counters import Counters
from scale_mae.metrics.node import Node
from scale_mae.metrics.nvml import THROTTLE_REASONS, Nvml
from scale_mae.metrics.step_timer import PAUSE_PHASES

PREFIX = "scale_mae_"


@dataclass(frozen=True)
class MetricSpec:
    """A Prometheus metric. Its name on the wire is ``scale_mae_`` and its key in the table; a counter also ends in ``_total``.

    Attributes:
        type: Type of the metric.
        help: Description, with the unit if the name does not contain it.
        labels: Names of its labels.
        source: Key of the log line (for a gauge) or name of the counter (for a counter) that contains its value. ``None`` if
            the value is computed.
    """

    type: Literal["gauge", "counter", "histogram", "info"]
    help: str
    labels: tuple[str, ...] = ()
    source: str | None = None


INFO_LABELS = ("run", "job_id", "restart", "version", "model", "target", "host")
NODE_METRICS = {  # every node serves these
    "gpu_memory_allocated_bytes": MetricSpec("gauge", "Largest peak of allocated GPU memory of a process on this node."),
    "gpu_memory_reserved_bytes": MetricSpec("gauge", "Largest GPU memory that PyTorch reserves in a process on this node."),
    "host_rss_bytes": MetricSpec("gauge", "Largest resident host memory of a process on this node."),
    "disk_free_bytes": MetricSpec("gauge", "Free space of the file system that contains the run directory."),
    "disk_size_bytes": MetricSpec("gauge", "Size of the file system that contains the run directory."),
    "gpu_power_watts": MetricSpec("gauge", "Power draw of the GPU.", ("gpu",)),
    "gpu_temperature_celsius": MetricSpec("gauge", "Temperature of the GPU.", ("gpu",)),
    "gpu_throttled": MetricSpec("gauge", "1 if the GPU is throttled for this reason, otherwise 0.", ("gpu", "reason")),
    "gpu_energy_joules": MetricSpec("counter", "Energy that the GPU has used for this run.", ("gpu",)),
}
RUN_METRICS = {  # the first node serves these in addition
    "info": MetricSpec("info", "Labels that describe the run and its current start.", INFO_LABELS),
    "start_timestamp_seconds": MetricSpec("gauge", "Unix time at which the processes of the run last started."),
    "last_step_timestamp_seconds": MetricSpec(
        "gauge", "Unix time at which the run last completed a step or a part of an evaluation."
    ),
    "loss": MetricSpec("gauge", "Loss of the last logged step. NaN if it was not finite.", source="loss"),
    "loss_smoothed": MetricSpec("gauge", "Loss averaged over about 100 steps.", source="loss_smoothed"),
    "learning_rate": MetricSpec("gauge", "Learning rate of the last logged step.", source="lr"),
    "gradient_norm": MetricSpec("gauge", "Global norm of the gradients before clipping.", source="grad_norm"),
    "loss_scale": MetricSpec("gauge", "Loss scale of fp16. 1 for bf16 and fp32.", source="loss_scale"),
    "step": MetricSpec("gauge", "Completed optimizer steps of the schedule.", source="step"),
    "total_steps": MetricSpec("gauge", "Optimizer steps of the whole schedule.", source="total_steps"),
    "epoch": MetricSpec("gauge", "Completed epochs of the schedule.", source="epoch"),
    "schedule_images": MetricSpec("gauge", "Images of the completed steps of the schedule.", source="images"),
    "images_per_second": MetricSpec("gauge", "Images per second, without checkpoints and evaluations.", source="images_per_s"),
    "mfu": MetricSpec("gauge", "Model FLOP utilization: share of the peak in [0, 1], without recomputation.", source="mfu"),
    "hfu": MetricSpec("gauge", "Hardware FLOP utilization: share of the peak in [0, 1], with recomputation.", source="hfu"),
    "slowest_rank": MetricSpec("gauge", "Rank whose own work takes the longest per step.", source="slowest_rank"),
    "slowest_rank_seconds": MetricSpec(
        "gauge", "Seconds per step of the own work of the slowest rank.", source="slowest_rank_s"
    ),
    "fastest_rank": MetricSpec("gauge", "Rank whose own work takes the shortest per step.", source="fastest_rank"),
    "fastest_rank_seconds": MetricSpec(
        "gauge", "Seconds per step of the own work of the fastest rank.", source="fastest_rank_s"
    ),
    "checkpoint_step": MetricSpec("gauge", "Step of the newest checkpoint.", source="checkpoint_step"),
    "checkpoint_duration_seconds": MetricSpec(
        "gauge", "Time from the start of the newest save to its commit.", source="checkpoint_duration_s"
    ),
    "checkpoint_size_bytes": MetricSpec("gauge", "Size of the newest checkpoint.", source="checkpoint_bytes"),
    "checkpoint_interval_seconds": MetricSpec(
        "gauge", "Expected time between two checkpoints at the current speed.", source="checkpoint_interval_s"
    ),
    "checkpoint_timestamp_seconds": MetricSpec("gauge", "Unix time at which the newest checkpoint was committed."),
    "validation_top1_ratio": MetricSpec("gauge", "Top-1 accuracy of the newest evaluation in [0, 1].", source="val_top1"),
    "validation_top5_ratio": MetricSpec("gauge", "Top-5 accuracy of the newest evaluation in [0, 1].", source="val_top5"),
    "validation_loss": MetricSpec("gauge", "Cross-entropy of the newest evaluation in nats.", source="val_loss"),
    "estimated_end_timestamp_seconds": MetricSpec("gauge", "Unix time at which the schedule ends at the current speed."),
    "joules_per_million_images": MetricSpec("gauge", "Energy that all GPUs use for one million images."),
    "finished": MetricSpec("gauge", "1 if the schedule is complete, otherwise 0."),
    "images": MetricSpec("counter", "Images trained on. Images of repeated steps count again.", source="images"),
    "steps": MetricSpec("counter", "Completed optimizer steps. Repeated steps count again.", source="steps"),
    "skipped_steps": MetricSpec("counter", "Steps that were skipped because of their gradients.", source="skipped_steps"),
    "rollbacks": MetricSpec("counter", "Rollbacks to an earlier checkpoint.", source="rollbacks"),
    "restarts": MetricSpec("counter", "Starts of the run after the first one.", source="restarts"),
    "decoder_fallbacks": MetricSpec(
        "counter", "Images that Pillow decoded because DALI could not.", source="decoder_fallbacks"
    ),
    "checkpoints": MetricSpec("counter", "Checkpoints written.", source="checkpoints"),
    "checkpoint_failures": MetricSpec("counter", "Checkpoints that could not be written.", source="checkpoint_failures"),
    "decode_failures": MetricSpec("counter", "Images that could not be read and were replaced.", ("cause",)),
    "step_seconds": MetricSpec(
        "histogram", "Duration of a step by phase. The phase `step` is the sum without checkpoint and evaluation.", ("phase",)
    ),
}
METRICS = NODE_METRICS | RUN_METRICS
HISTOGRAM_PHASES = ("step", "data_loading", "forward_backward", "optimizer", *PAUSE_PHASES)

Samples = Iterable[tuple[Sequence[str], float | None]]


def node_families(node: Node, nvml: Nvml, counters: Counters, run_dir: Path) -> Iterator[Metric]:
    """Yield the metrics of a node: memory, disk and GPUs."""
    memory = node.memory
    yield _family("gpu_memory_allocated_bytes", [([], memory and memory.gpu_allocated)])
    yield _family("gpu_memory_reserved_bytes", [([], memory and memory.gpu_reserved)])
    yield _family("host_rss_bytes", [([], memory and memory.host_rss)])
    free_bytes = size_bytes = None
    with suppress(OSError):
        disk = os.statvfs(run_dir)
        free_bytes, size_bytes = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    yield _family("disk_free_bytes", [([], free_bytes)])
    yield _family("disk_size_bytes", [([], size_bytes)])
    readings = [nvml.read(gpu) for gpu in node.gpus]
    yield _family("gpu_power_watts", [([str(gpu.index)], gpu.power) for gpu in readings])
    yield _family("gpu_temperature_celsius", [([str(gpu.index)], gpu.temperature) for gpu in readings])
    throttled = [
        ([str(gpu.index), reason], float(reason in gpu.throttle_reasons))
        for gpu in readings
        if gpu.throttle_reasons is not None
        for reason in THROTTLE_REASONS.values()
    ]
    yield _family("gpu_throttled", throttled)
    energy = counters.by_label(f"gpu_energy/{node.number}")
    yield _family("gpu_energy_joules", [([gpu], joules) for gpu, joules in energy.items()])


def run_families(
    info: dict[str, str], started: float, last_progress: float | None, metrics: Metrics, counters: Counters
) -> Iterator[Metric]:
    """Yield the metrics of the run as a whole.

    Args:
        info: Values of :data:`INFO_LABELS`.
        started: Time at which the processes started, in seconds since 1970.
        last_progress: Time of the last progress, in seconds since 1970; ``None`` before the first step.
        metrics: The last log line; empty before the first log step.
        counters: Counters of the run at that log step.
    """
    family = InfoMetricFamily(PREFIX.rstrip("_"), RUN_METRICS["info"].help)
    family.add_metric([], info)
    yield family
    for name, spec in RUN_METRICS.items():
        if spec.type == "gauge" and spec.source:
            value = metrics.get(spec.source)
            yield _family(name, [([], math.nan if name == "loss" and metrics and value is None else value)])
        elif spec.type == "counter" and spec.source:
            yield _family(name, [([], counters[spec.source])])
    computed = {"start_timestamp_seconds": started, "last_step_timestamp_seconds": last_progress, **_computed(metrics)}
    for name, value in computed.items():
        yield _family(name, [([], value)])
    yield _family("decode_failures", [([cause], count) for cause, count in counters.by_label("decode_failures").items()])
    spec = RUN_METRICS["step_seconds"]
    histogram = HistogramMetricFamily(f"{PREFIX}step_seconds", spec.help, labels=spec.labels)
    for phase in HISTOGRAM_PHASES:
        histogram.add_metric([phase], *counters.histogram(f"step_seconds/{phase}"))
    yield histogram


def _family(name: str, samples: Samples) -> Metric:
    """Return a gauge or counter with its samples. A sample without a value is omitted."""
    spec = METRICS[name]
    make = GaugeMetricFamily if spec.type == "gauge" else CounterMetricFamily
    family = make(PREFIX + name, spec.help, labels=spec.labels)
    for labels, value in samples:
        if value is not None:
            family.add_metric(labels, value)
    return family


def _computed(metrics: Metrics) -> dict[str, float | None]:
    """Return the gauges that follow from several values of a log line."""
    now, age, eta, joules = (metrics.get(key) for key in ("time", "checkpoint_age_s", "eta_s", "energy_j"))
    images, step, total = (metrics.get(key) for key in ("images_processed", "step", "total_steps"))
    return {
        "checkpoint_timestamp_seconds": None if now is None or age is None else now - age,
        "estimated_end_timestamp_seconds": None if now is None or eta is None else now + eta,
        "joules_per_million_images": None if joules is None or not images else joules / images * 1e6,
        "finished": None if step is None or total is None else float(step >= total),
    }
