"""The parts that measure a run: step timer, metrics, counters, GPU readings, the log with its sinks, and the exporter."""

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
from scale_mae.engine.activation_checkpointing import count_recomputed_flops
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
from scale_mae.system.versions import package_versions


@dataclass(frozen=True)
class Monitoring:
    """The parts that measure a run and publish its metrics.

    Attributes:
        run: Identity and labels of the run.
        step_timer: Times the phases of steps.
        calculator: Computes the metrics of a log step.
        counters: Counters that continue across restarts.
        node: The node of this process.
        nvml: GPU readings.
        gpu: NVML's index of this process's GPU; None without a GPU.
        log: The sinks of this process. Most processes have none.
    """

    run: RunInfo
    step_timer: StepTimer
    calculator: MetricsCalculator
    counters: Counters
    node: Node
    nvml: Nvml
    gpu: int | None
    log: Log

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"counters": dict(self.counters.values), **self.calculator.state()}


def build_monitoring(
    config: Config,
    world: World,
    model: TrainableModule,
    dataset_size: int,
    total_steps: int,
    *,
    step: int = 0,
    state: dict[str, Any] | None = None,
) -> Monitoring:
    """Build all parts. All processes call this.

    Args:
        config: The configuration of the run.
        world: The process group.
        model: The model. Its forward passes are timed.
        dataset_size: Number of training images.
        total_steps: Length of the schedule.
        step: The number of steps done.
        state: :meth:`Monitoring.state` of the checkpoint from which the run resumes.
    """
    run_dir, state, nvml = Path(config.run.dir), state or {}, Nvml()
    run_id, counters = world.run_on_main(lambda: (get_run_id(run_dir), _count_restart(run_dir, state.get("counters"))))
    node = detect_node(world, nvml)
    step_timer = StepTimer(world.device)
    model.register_forward_hook(step_timer.mark_forward)
    calculator = _build_calculator(config, world, model, dataset_size, total_steps)
    calculator.restore(state)
    run = RunInfo(run_id, run_dir, _run_labels(config, counters))
    sinks: list[Sink] = []
    warnings: list[str] = []
    if config.log.metrics_port is not None and (world.local_rank == 0 or world.is_main):
        discovery_dir = Path(config.log.discovery_dir or run_dir.resolve().parent / "prometheus")
        port, is_main = config.log.metrics_port, world.is_main
        try:
            exporter = Exporter(run, node, nvml, counters, step_timer, port, discovery_dir, is_first=is_main)
            sinks, warnings = [exporter], exporter.warnings
        except OSError as error:
            warnings = [f"Node {node.number} exports no metrics to Prometheus: {error}"]
    if world.is_main:
        sinks += build_trackers(config, run_id, step)
    log = build_log(run_dir, total_steps, step, sinks) if world.is_main else Log(sinks)
    for warning in warnings:
        (log.write_message if world.is_main else print_to_stderr)(warning)
    return Monitoring(run, step_timer, calculator, counters, node, nvml, node.placements[world.rank][1], log)


def build_start_event(monitoring: Monitoring, world: World, zero_stage: int) -> dict[str, Any]:
    """Return the fields of the event ``start`` in the run's history."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type
    return {
        "restarts": int(monitoring.counters["restarts"]),
        "world_size": world.size,
        "zero_stage": zero_stage,
        "device": device,
        "host": node_address(),
        "job_id": _slurm_job_id(),
        "versions": package_versions(),
        "command": shlex.join(sys.orig_argv),
    }


def describe_settings(config: Config, world: World, task_description: str, zero_stage: int) -> str:
    """Return the settings of a run for its log: task, batch, number of ranks, precision, ZeRO stage and learning rate."""
    train, accumulation_steps = config.train, config.accumulation(world.size)
    return (
        f"{task_description}, {train.global_batch} images per step ({train.micro_batch} per rank x {accumulation_steps} "
        f"accumulation {'step' if accumulation_steps == 1 else 'steps'} x {world.size} {world.device.type} "
        f"{'rank' if world.size == 1 else 'ranks'}), {train.precision}, ZeRO-{zero_stage}, "
        f"peak lr {config.peak_lr:.3g}"
    )


def _build_calculator(
    config: Config, world: World, model: TrainableModule, dataset_size: int, total_steps: int
) -> MetricsCalculator:
    flops, train = model.flops(), config.train
    peak = peak_flops(torch.cuda.get_device_name(world.device), train.precision) if world.device.type == "cuda" else None
    return MetricsCalculator(
        global_batch=train.global_batch,
        dataset_size=dataset_size,
        world_size=world.size,
        flops_per_image=flops.train,
        recomputed_flops_per_image=count_recomputed_flops(
            flops, train.activation_checkpointing, train.activation_checkpointing_every
        ),
        total_steps=total_steps,
        peak_flops=peak,
    )


def _count_restart(run_dir: Path, state: dict[str, float] | None) -> Counters:
    """Restore the counters of the run, and count this start as a restart if it is not the first start."""
    counters = restore_counters(run_dir, state)
    counters.add("restarts", 1 if counters.values else 0)
    return counters


def _run_labels(config: Config, counters: Counters) -> dict[str, str]:
    return {
        "job_id": _slurm_job_id() or "",
        "restart": f"{counters['restarts']:.0f}",
        "version": __version__,
        "model": config.model.size,
        "target": config.model.target if config.run.task == "pretrain" else config.run.task,
        "host": node_address(),
    }


def _slurm_job_id() -> str | None:
    return os.environ.get("SLURM_JOB_ID")
