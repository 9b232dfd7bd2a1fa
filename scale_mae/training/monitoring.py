"""What measures a run and where it is told, put together: clocks, counters, the log with its sinks, the exporter."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scale_mae import __version__
from scale_mae.config import Config
from scale_mae.distributed.process_group import World
from scale_mae.engine.activation_checkpointing import recomputed_flops
from scale_mae.engine.trainable import TrainableModule
from scale_mae.metrics.calculator import MetricsCalculator
from scale_mae.metrics.counters import Counters, restore_counters
from scale_mae.metrics.exporter import Exporter, RunInfo
from scale_mae.metrics.node import Node, detect_node, node_address
from scale_mae.metrics.nvml import Nvml
from scale_mae.metrics.peak_flops import peak_flops
from scale_mae.metrics.sinks import Log, Sink, build_log, print_to_stderr
from scale_mae.metrics.step_timer import StepTimer
from scale_mae.metrics.trackers import build_trackers
from scale_mae.runs.run_id import get_run_id


@dataclass(frozen=True)
class Monitoring:
    """See this module's text.

    Attributes:
        run: what is told of the run itself.
        watch: laps of its steps.
        meter: makes the metrics of a log line.
        counters: counts that go on over restarts.
        node: this machine.
        nvml: its GPUs.
        gpu: NVML's number of this process's GPU.
        log: sinks of this process; most processes have none.
    """

    run: RunInfo
    watch: StepTimer
    calculator: MetricsCalculator
    counters: Counters
    node: Node
    nvml: Nvml
    gpu: int | None
    log: Log

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "counters": dict(self.counters.values),
            **self.calculator.state(),
        }


def build_monitoring(
    config: Config, world: World, model: TrainableModule, images: int, total_steps: int, step: int, saved: dict[str, Any] | None
) -> Monitoring:
    """Put everything together. All processes call it.

    Args:
        config: of the run.
        world: the processes.
        model: what is trained.
        images: of the data set.
        total_steps: of the schedule.
        step: where the run stands.
        saved: :meth:`Monitoring.state` of the checkpoint that it goes on from.
    """
    run_dir, saved, nvml = Path(config.run.dir), saved or {}, Nvml()
    name, counters = world.run_on_main(lambda: (get_run_id(run_dir), _restarted(run_dir, saved.get("counters"))))
    node = detect_node(world, nvml)
    watch = StepTimer(world.device)
    model.register_forward_hook(watch.mark_forward)
    flops = model.flops()
    recomputed = recomputed_flops(flops, config.train.activation_checkpointing, config.train.activation_checkpointing_every)
    peak = None
    if world.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(world.device), config.train.precision)
    calculator = MetricsCalculator(config.train.global_batch, images, world.size, flops.train, recomputed, total_steps, peak)
    calculator.restore(saved)
    run = RunInfo(name, run_dir, _facts(config, counters))
    sinks: list[Sink] = []
    problems: list[str] = []
    if config.log.metrics_port is not None and (world.local_rank == 0 or world.is_main):
        discovery = Path(config.log.discovery_dir or run_dir.resolve().parent / "prometheus")
        try:
            exporter = Exporter(run, node, nvml, counters, watch, config.log.metrics_port, discovery, is_first=world.is_main)
            sinks, problems = [exporter], exporter.warnings
        except OSError as error:
            problems = [f"no metrics for Prometheus from node {node.number}: {error}"]
    if world.is_main:
        sinks += build_trackers(config, name, step)
    log = build_log(run_dir, total_steps, step, sinks) if world.is_main else Log(sinks)
    for problem in problems:
        (log.write_message if world.is_main else print_to_stderr)(problem)
    return Monitoring(run, watch, calculator, counters, node, nvml, node.placements[world.rank][1], log)


def start_facts(instruments: Monitoring, world: World, zero_stage: int, versions: dict[str, str]) -> dict[str, Any]:
    """What the history says of a process group that begins."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type
    return {
        "restarts": int(instruments.counters["restarts"]),
        "world_size": world.size,
        "zero_stage": zero_stage,
        "device": device,
        "host": node_address(),
        "job_id": _job_id(),
        "versions": versions,
        "command": shlex.join(sys.orig_argv),
    }


def _restarted(run_dir: Path, saved: dict[str, float] | None) -> Counters:
    """The run's counters, this start among them, if it is not the first."""
    counters = restore_counters(run_dir, saved)
    counters.add("restarts", 1 if counters.values else 0)
    return counters


def _facts(config: Config, counters: Counters) -> dict[str, str]:
    return {
        "job_id": _job_id() or "",
        "restart": f"{counters['restarts']:.0f}",
        "version": __version__,
        "model": config.model.size,
        "target": config.model.target if config.run.task == "pretrain" else config.run.task,
        "host": node_address(),
    }


def _job_id() -> str | None:
    return os.environ.get("SLURM_JOB_ID")
