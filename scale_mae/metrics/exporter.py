"""Metrics for Prometheus: one exporter a node, found through a file that a Prometheus watches.

The first process of each node serves what its last log step has left; nothing is asked for a scrape but the free space of the
disk and NVML, and neither touches the accelerator. The first node also serves what concerns the run as a whole. How many series
there are depends on the number of GPUs of a node, never on the number of processes.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from scale_mae.metrics.calculator import Metrics
from scale_mae.metrics.counters import Counters
from scale_mae.metrics.hardware import THROTTLE_REASONS, Nvml
from scale_mae.metrics.node import Node, node_address
from scale_mae.metrics.step_timer import PAUSE_PHASES, StepTimer

GIB = 2**30
GAUGES = {  # of the run: name -> (key of a log line, what it says)
    "loss": ("loss", "Loss of the last logged step; NaN when it was not finite."),
    "loss_smoothed": ("loss_smoothed", "Loss averaged over about 100 steps."),
    "learning_rate": ("lr", "Learning rate of the last logged step."),
    "gradient_norm": ("grad_norm", "Global norm of the gradients before clipping."),
    "loss_scale": ("loss_scale", "Loss scale of fp16, else 1."),
    "step": ("step", "Steps of the schedule that are done."),
    "total_steps": ("total_steps", "Steps of the whole schedule."),
    "epoch": ("epoch", "Epochs of the schedule that are done."),
    "schedule_images": ("images", "Images of the schedule that are done."),
    "images_per_second": ("images_per_s", "Images a second, time of saving left out."),
    "mfu": ("mfu", "Model FLOP utilisation: share of the devices' peak, recomputation not counted."),
    "hfu": ("hfu", "Hardware FLOP utilisation: share of the devices' peak, recomputation counted."),
    "checkpoint_step": ("checkpoint_step", "Step of the newest checkpoint."),
    "checkpoint_duration_seconds": ("checkpoint_duration_s", "What the newest checkpoint took until it had its name."),
    "checkpoint_size_bytes": ("checkpoint_bytes", "Size of the newest checkpoint."),
    "validation_top1_ratio": ("val_top1", "Top-1 accuracy of the newest evaluation; of classifiers."),
    "validation_top5_ratio": ("val_top5", "Top-5 accuracy of the newest evaluation; of classifiers."),
    "validation_loss": ("val_loss", "Cross entropy of the newest evaluation, in nats; of classifiers."),
    "checkpoint_interval_seconds": ("checkpoint_interval_s", "Time between checkpoints, from the config and recent speed."),
}
COUNTERS = {  # of the run: name -> (count, what it says)
    "images": ("images", "Images trained on; those of work that was done twice count twice."),
    "steps": ("steps", "Steps done; repeated ones count again."),
    "skipped_steps": ("skipped_steps", "Steps whose gradients were not applied."),
    "rollbacks": ("rollbacks", "Times that the run went back to a checkpoint."),
    "restarts": ("restarts", "Times that the run was started again."),
    "decoder_fallbacks": ("decoder_fallbacks", "Images that DALI was to decode and Pillow did."),
    "checkpoints": ("checkpoints", "Checkpoints written."),
    "checkpoint_failures": ("checkpoint_failures", "Checkpoints lost."),
}
HISTOGRAM = ("step", "data_loading", "forward_backward", "optimizer", *PAUSE_PHASES)


@dataclass(frozen=True)
class RunInfo:
    """What an exporter says of the run that never changes in its life.

    Attributes:
        id: name of the run; see :func:`scale_mae.metrics.node.run_id`.
        dir: run directory.
        facts: labels of the info metric besides.
    """

    id: str
    dir: Path
    facts: dict[str, str]


class Exporter(Collector):
    """A sink that serves what it was given last.

    Args:
        run: what is served.
        node: the machine, and which part of it is served.
        nvml: asked at each scrape.
        counters: of the run; those of the last log step are served.
        watch: asked when the last step was done.
        port: 0 for any free one; one that is taken is replaced by a free one.
        discovery_dir: where the entry for Prometheus goes.
        is_first: whether the run as a whole is told here.

    Attributes:
        problems: what went wrong when it began, for people.

    Raises:
        OSError: there is no port at all.
    """

    def __init__(
        self,
        run: RunInfo,
        node: Node,
        nvml: Nvml,
        counters: Counters,
        watch: StepTimer,
        port: int,
        discovery_dir: Path,
        *,
        is_first: bool,
    ) -> None:
        self._run, self._node, self._nvml, self._counters, self._is_first = run, node, nvml, counters, is_first
        self._watch = watch
        self._started, self._asking = time.time(), threading.Lock()
        self._entry = discovery_dir / f"{run.id}-node{node.number}.json"
        self._content, self.problems = "", list[str]()
        self._take({})
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, registry=registry)
        except OSError as error:
            self._server, self._thread = start_http_server(0, registry=registry)
            self.problems.append(f"log.metrics_port={port} cannot be used ({error.strerror}); metrics are at port {self.port}")
        self._announce()

    @property
    def port(self) -> int:
        """Where it is served."""
        return int(self._server.server_port)

    def write_message(self, message: str) -> None:
        """Messages are not metrics."""

    def write_metrics(self, metrics: Metrics) -> None:
        """Serve these from now on."""
        self._take(metrics)

    def close(self, *, failed: bool = False) -> None:
        """Serve no more, and say so; of a run that failed the entry stays, so that Prometheus sees it missing."""
        with suppress(OSError):  # unless another job of this run has written its own
            if self._content and not failed and self._entry.read_text() == self._content:
                self._entry.unlink()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def collect(self) -> Iterator[Metric]:
        """Everything that is served; called in a thread of its own for each scrape."""
        metrics, counters, memory = self._snapshot
        yield from self._of_the_node(memory, counters)
        if self._is_first:
            yield from self._of_the_run(metrics, counters)

    def _take(self, metrics: Metrics) -> None:
        self._snapshot = (metrics, Counters(self._counters.values), dict(self._node.memory))

    def _announce(self) -> None:
        """Write the entry for Prometheus; take back those of nodes that the run no longer has and of others at this address."""
        number = str(self._node.number)
        labels = {"run": self._run.id, "node": number, "instance": f"{self._run.id}/node{number}"}
        here = f"{node_address()}:{self.port}"
        content = json.dumps([{"targets": [here], "labels": labels}]) + "\n"
        try:
            self._entry.parent.mkdir(parents=True, exist_ok=True)
            staging = self._entry.with_name(f".{self._entry.name}.tmp")
            staging.write_text(content)
            os.replace(staging, self._entry)
            self._content = content
            for path in self._entry.parent.glob(f"{self._run.id}-node*.json") if self._is_first else ():
                left = path.stem.rpartition("-node")[2]
                if left.isdigit() and int(left) >= self._node.count:
                    path.unlink(missing_ok=True)
            for path in self._entry.parent.glob("*-node*.json"):
                if path != self._entry and _names(path, here):
                    path.unlink(missing_ok=True)  # of a killed run; Prometheus would take our values for its
        except OSError as error:
            self.problems.append(
                f"log.discovery_dir={self._entry.parent}: cannot be written ({error.strerror}); "
                f"Prometheus does not learn of {here}"
            )

    def _of_the_node(self, memory: Metrics, counters: Counters) -> Iterator[Metric]:
        family = _gauge("memory_bytes", "The most memory that a process of this node has.", "kind")
        for kind, key in {
            "allocated": "memory_allocated_gib",
            "reserved": "memory_reserved_gib",
            "host_rss": "host_rss_gib",
        }.items():
            if (value := memory.get(key)) is not None:
                family.add_metric([kind], value * GIB)
        yield family
        free, size = (
            _gauge("disk_free_bytes", "Free space of the run directory."),
            _gauge("disk_size_bytes", "Size of its file system."),
        )
        with suppress(OSError):
            disk = os.statvfs(self._run.dir)
            free.add_metric([], disk.f_bavail * disk.f_frsize)
            size.add_metric([], disk.f_blocks * disk.f_frsize)
        yield from (free, size)
        power = _gauge("gpu_power_watts", "Power.", "gpu")
        heat = _gauge("gpu_temperature_celsius", "Temperature.", "gpu")
        held = _gauge("gpu_throttled", "Whether the GPU is held back, by reason.", "gpu", "reason")
        with self._asking:
            for gpu in map(self._nvml.read, self._node.gpus):
                for family, value in ((power, gpu.power), (heat, gpu.temperature)):
                    if value is not None:
                        family.add_metric([str(gpu.number)], value)
                for reason in THROTTLE_REASONS.values() if gpu.throttled is not None else ():
                    held.add_metric([str(gpu.number), reason], float(reason in (gpu.throttled or ())))
        yield from (power, heat, held)
        energy = CounterMetricFamily("scale_mae_gpu_energy_joules", "Energy that the GPU used for this run.", labels=["gpu"])
        for gpu_number, joules in counters.by_label(f"gpu_energy/{self._node.number}").items():
            energy.add_metric([gpu_number], joules)
        yield energy

    def _of_the_run(self, metrics: Metrics, counters: Counters) -> Iterator[Metric]:
        info = InfoMetricFamily("scale_mae", "What runs.")
        info.add_metric([], {"run": self._run.id, **self._run.facts})
        yield info
        yield _gauge("start_timestamp_seconds", "When this process group began.", value=self._started)
        yield _gauge(
            "last_step_timestamp_seconds",
            "When the host was through with a step, or a part of an evaluation.",
            value=self._watch.last_progress_time,
        )
        for name, (key, text) in GAUGES.items():
            value = metrics.get(key)
            yield _gauge(name, text, value=math.nan if name == "loss" and metrics and value is None else value)
        yield from _derived(metrics)
        for name, (key, text) in COUNTERS.items():
            yield CounterMetricFamily(f"scale_mae_{name}", text, value=counters[key])
        failures = CounterMetricFamily("scale_mae_decode_failures", "Images that were replaced.", labels=["cause"])
        for cause, number in counters.by_label("decode_failures").items():
            failures.add_metric([cause], number)
        yield failures
        histogram = HistogramMetricFamily(
            "scale_mae_step_seconds", "Time of a step; step is all but checkpoint and evaluation.", labels=["phase"]
        )
        for phase in HISTOGRAM:
            histogram.add_metric([phase], *counters.histogram(f"step_seconds/{phase}"))
        yield histogram


def _names(path: Path, target: str) -> bool:
    """Whether a file is an exporter's entry, and names just this target; people may have put files of their own beside them."""
    try:
        (group,) = json.loads(path.read_text())
        labels, targets = group["labels"], group["targets"]
        return bool(targets == [target] and path.name == f"{labels['run']}-node{labels['node']}.json")
    except (OSError, ValueError, TypeError, KeyError):
        return False  # gone, or nobody's


def _gauge(name: str, text: str, *labels: str, value: float | None = None) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"scale_mae_{name}", text, labels=labels)
    if value is not None:
        family.add_metric([], value)
    return family


def _derived(metrics: Metrics) -> Iterator[Metric]:
    """Gauges that a log line has in another form."""
    seconds, number = (
        _gauge("rank_seconds", "Time a step of the slowest and fastest process, without waiting for others.", "which"),
        _gauge("rank_number", "Which process that is.", "which"),
    )
    for which in ("slowest", "fastest"):
        for family, key in ((seconds, f"{which}_rank_s"), (number, f"{which}_rank")):
            if (value := metrics.get(key)) is not None:
                family.add_metric([which], value)
    yield from (seconds, number)
    now, age, left, joules = (metrics.get(key) for key in ("time", "checkpoint_age_s", "eta_s", "energy_j"))
    saved = None if now is None or age is None else now - age
    yield _gauge("checkpoint_timestamp_seconds", "When the newest checkpoint had its name.", value=saved)
    end = None if now is None or left is None else now + left
    yield _gauge("estimated_end_timestamp_seconds", "When the schedule will be done at the present speed.", value=end)
    images = metrics.get("images_processed")
    per_million = None if joules is None or not images else joules / images * 1e6
    yield _gauge("joules_per_million_images", "Energy of all GPUs for a million images.", value=per_million)
    step, total = metrics.get("step"), metrics.get("total_steps")
    finished = None if step is None or total is None else float(step >= total)
    yield _gauge("finished", "1 when the schedule is done.", value=finished)
