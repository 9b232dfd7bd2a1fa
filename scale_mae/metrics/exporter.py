"""Serves the metrics of a run to Prometheus: one HTTP endpoint per node, and a target file for service discovery.

The first process of each node serves the values of the last log step. A scrape reads only NVML and the free disk space; it does
not touch the accelerator. The first node also serves the metrics of the run as a whole. The number of series depends on the
number of GPUs per node, not on the number of processes. :mod:`scale_mae.metrics.prometheus_metrics` lists the metrics.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from scale_mae.metrics.calculator import Metrics
from scale_mae.metrics.counters import Counters
from scale_mae.metrics.node import Node, node_address
from scale_mae.metrics.nvml import Nvml
from scale_mae.metrics.prometheus_metrics import node_families, run_families
from scale_mae.metrics.step_timer import StepTimer


@dataclass(frozen=True)
class RunInfo:
    """What identifies a run in Prometheus.

    Attributes:
        id: ID of the run; see :func:`scale_mae.runs.run_id.get_run_id`.
        dir: Run directory.
        labels: Labels of the info metric in addition to the ID; see :data:`scale_mae.metrics.prometheus_metrics.INFO_LABELS`.
    """

    id: str
    dir: Path
    labels: dict[str, str]


class Exporter(Collector):
    """A sink that serves the metrics of the last log step over HTTP.

    Args:
        run: The run.
        node: This node.
        nvml: Source of the GPU values; each scrape reads it.
        counters: Counters of the run. The exporter serves their values of the last log step.
        timer: Source of the time of the last step.
        port: Port to listen on; 0 selects a free port. If the port is in use, a free port replaces it.
        discovery_dir: Directory of the target file for Prometheus.
        is_first: Whether this exporter also serves the metrics of the run as a whole.

    Attributes:
        warnings: Problems during the start, for the log.

    Raises:
        OSError: No port is available.
    """

    def __init__(
        self,
        run: RunInfo,
        node: Node,
        nvml: Nvml,
        counters: Counters,
        timer: StepTimer,
        port: int,
        discovery_dir: Path,
        *,
        is_first: bool,
    ) -> None:
        self._run, self._node, self._nvml, self._counters, self._is_first = run, node, nvml, counters, is_first
        self._timer = timer
        self._started, self._scrape_lock = time.time(), threading.Lock()
        self._target_file = discovery_dir / f"{run.id}-node{node.number}.json"
        self._target_content, self.warnings = "", list[str]()
        self._take_snapshot({})
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, registry=registry)
        except OSError as error:
            self._server, self._thread = start_http_server(0, registry=registry)
            self.warnings.append(
                f"log.metrics_port={port}: not available ({error.strerror}). Port {self.port} serves the metrics instead."
            )
        self._write_target_file()

    @property
    def port(self) -> int:
        """The port that serves the metrics."""
        return int(self._server.server_port)

    def write_message(self, message: str) -> None:
        """Ignore messages."""

    def write_metrics(self, metrics: Metrics) -> None:
        """Serve these metrics from now on."""
        self._take_snapshot(metrics)

    def close(self, *, failed: bool = False) -> None:
        """Stop serving and remove the target file.

        After a failure the file remains, so that Prometheus reports that the target is down.
        """
        with suppress(OSError):
            # another job of this run may have replaced the file by its own
            if self._target_content and not failed and self._target_file.read_text() == self._target_content:
                self._target_file.unlink()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics. The HTTP server calls this in a separate thread for each scrape."""
        metrics, counters, node = self._snapshot
        with self._scrape_lock:
            families = list(node_families(node, self._nvml, counters, self._run.dir))
        yield from families
        if self._is_first:
            info = {"run": self._run.id, **self._run.labels}
            yield from run_families(info, self._started, self._timer.last_progress_time, metrics, counters)

    def _take_snapshot(self, metrics: Metrics) -> None:
        self._snapshot = (metrics, Counters(self._counters.values), replace(self._node))

    def _write_target_file(self) -> None:
        """Write the target file of this exporter and remove outdated ones.

        Target files of nodes that the run no longer has are outdated, and so are those of killed runs with the same address.
        """
        number = str(self._node.number)
        labels = {"run": self._run.id, "node": number, "instance": f"{self._run.id}/node{number}"}
        target = f"{node_address()}:{self.port}"
        content = json.dumps([{"targets": [target], "labels": labels}]) + "\n"
        try:
            self._target_file.parent.mkdir(parents=True, exist_ok=True)
            staging = self._target_file.with_name(f".{self._target_file.name}.tmp")
            staging.write_text(content)
            os.replace(staging, self._target_file)
            self._target_content = content
            self._remove_outdated(target)
        except OSError as error:
            self.warnings.append(
                f"log.discovery_dir={self._target_file.parent}: not writable ({error.strerror}). "
                f"Prometheus cannot discover the exporter at {target}."
            )

    def _remove_outdated(self, target: str) -> None:
        folder = self._target_file.parent
        for path in folder.glob(f"{self._run.id}-node*.json") if self._is_first else ():
            number = path.stem.rpartition("-node")[2]
            if number.isdigit() and int(number) >= self._node.count:
                path.unlink(missing_ok=True)
        for path in folder.glob("*-node*.json"):
            if path != self._target_file and _is_target_file_of(path, target):
                path.unlink(missing_ok=True)  # otherwise Prometheus would assign our values to the killed run


def _is_target_file_of(path: Path, target: str) -> bool:
    """Return whether an exporter wrote this file for exactly this target. The directory may contain files of other origin."""
    try:
        (group,) = json.loads(path.read_text())
        labels, targets = group["labels"], group["targets"]
        return bool(targets == [target] and path.name == f"{labels['run']}-node{labels['node']}.json")
    except (OSError, ValueError, TypeError, KeyError):
        return False  # removed meanwhile, or not written by an exporter
