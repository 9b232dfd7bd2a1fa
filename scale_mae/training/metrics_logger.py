"""Logs a run: the metrics of log steps, checkpoints, replaced images, evaluations, and the events in ``history.jsonl``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_mae.checkpoint.manifest import read_manifest
from scale_mae.checkpoint.paths import MANIFEST_FILE, get_step
from scale_mae.checkpoint.saver import Saver, SaveResult
from scale_mae.data.decoders import Decoder
from scale_mae.data.errors import ImageStatus
from scale_mae.data.failure_counter import DecodeFailure, FailureCounter
from scale_mae.distributed.process_group import World
from scale_mae.metrics.calculator import Metrics, ProcessStats, local_seconds
from scale_mae.metrics.counters import FILE as COUNTERS_FILE
from scale_mae.metrics.memory import max_memory, memory_usage
from scale_mae.metrics.sinks import print_to_stderr
from scale_mae.metrics.step_timer import PAUSE_PHASES, PhaseSeconds, group_phases
from scale_mae.runs import history
from scale_mae.training.monitoring import Monitoring
from scale_mae.training.time_limit import StopTimeEstimator


@dataclass
class NewestCheckpoint:
    """The newest checkpoint of a run. A field is None if it is unknown or there is no checkpoint."""

    step: int | None = None
    time: float | None = None
    seconds: float | None = None
    nbytes: int | None = None

    @classmethod
    def read(cls, checkpoint: Path) -> NewestCheckpoint:
        """Read the step, time and size of a checkpoint from its manifest."""
        files = read_manifest(checkpoint).files.values()
        modified = (checkpoint / MANIFEST_FILE).stat().st_mtime
        return cls(get_step(checkpoint), modified, None, sum(int(file["bytes"]) for file in files))


class MetricsLogger:
    """Gathers values from all processes and logs them on rank 0. All processes call the same methods at the same steps.

    Args:
        monitoring: The parts that measure the run, and its log.
        world: The process group.
        failure_counter: Counts the replaced images.
        saver: Reports how its saves ended.
        stop_time: Gets the durations of the saves.
        decoder: Counts its fallbacks.
        save_interval: Steps between checkpoints.
        newest_checkpoint: The checkpoint from which the run resumes, if any.
        skipped_steps: Number of skipped steps so far.
        rollbacks: Number of rollbacks so far.
    """

    def __init__(
        self,
        *,
        monitoring: Monitoring,
        world: World,
        failure_counter: FailureCounter,
        saver: Saver,
        stop_time: StopTimeEstimator,
        decoder: Decoder,
        save_interval: int,
        newest_checkpoint: Path | None = None,
        skipped_steps: int = 0,
        rollbacks: int = 0,
    ) -> None:
        self._monitoring, self._world, self.decoder = monitoring, world, decoder
        self.log, self.failure_counter, self.saver, self.stop_time = monitoring.log, failure_counter, saver, stop_time
        self._save_interval, self._newest_checkpoint = save_interval, self._read_checkpoint(newest_checkpoint)
        self._global_batch = monitoring.calculator.global_batch
        self._failures: list[DecodeFailure] = []  # of this process, since the last gather
        self._failure_metrics: Metrics = {}
        self._evaluation: Metrics = {}  # of the newest evaluation
        self._step_times: list[PhaseSeconds] = []  # of the steps since the last log line
        self._energy = monitoring.nvml.energy_joules(monitoring.gpu)
        self._unwritable: set[str] = set()  # files whose write error has been reported
        self._follow_totals(skipped_steps=skipped_steps, fallbacks=0, rollbacks=rollbacks)
        self._save_counters()

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return self._monitoring.state()

    def roll_back(self, checkpoint: Path, state: Mapping[str, Any], failure_counter: FailureCounter, decoder: Decoder) -> None:
        """Continue from an earlier checkpoint. Counters keep their values; the smoothed loss is that of the checkpoint.

        Args:
            checkpoint: The checkpoint, which is now the newest.
            state: Its :meth:`state`.
            failure_counter: Its failure counter.
            decoder: A new decoder.
        """
        self._monitoring.calculator.restore(state)
        decoder.fallbacks = self.decoder.fallbacks
        self.failure_counter, self.decoder = failure_counter, decoder
        self._newest_checkpoint = self._read_checkpoint(checkpoint)

    def add_decode_failures(self, failures: Sequence[DecodeFailure]) -> None:
        """Remember images that this process had to replace, until the next log step."""
        self._failures += failures

    def log_decode_failures(self, step: int) -> None:
        """Log and count the images that all processes replaced since the last call, and count the steps."""
        self._step_times += self._read_step_times()
        self._gather(step, None)

    def log_saves(self) -> None:
        """Log the saves that have ended since the last call."""
        for save in self.saver.take_results():
            self.stop_time.add_save(save.seconds)
            if save.error:
                self.log.write_message(f"Checkpoint not saved ({self.saver.failures} so far): {save.error}")
            else:
                self.log.write_message(
                    f"Saved checkpoint {save.path} ({save.nbytes / 1e9:.3g} GB) in {save.seconds:.1f} s; training was blocked "
                    f"for {save.blocked_seconds:.1f} s."
                )
            for message in save.messages:
                self.log.write_message(message)
            self._record_save(save)
            self._save_counters()  # so that a kill does not lose the count

    def log_step(
        self, step: int, loss: float, lr: float, grad_norm: float | None, loss_scale: float, skipped_steps: int, rollbacks: int
    ) -> None:
        """Log the metrics of a log step; see :mod:`scale_mae.metrics.log_keys`.

        Args:
            step: The number of steps done.
            loss: Loss of the last step's global batch.
            lr: Learning rate of the last step.
            grad_norm: Gradient norm of the last step before clipping.
            loss_scale: Loss scale of fp16, else 1.
            skipped_steps: Number of skipped steps so far.
            rollbacks: Number of rollbacks so far.

        Raises:
            DataError: More images were replaced than ``data.max_failure_ratio`` allows.
        """
        monitoring, step_times = self._monitoring, self._step_times + self._read_step_times()
        self._step_times = []
        failures, process_stats = self._gather(step, self._process_stats(step_times))
        self.log_saves()
        fallbacks = int(self._failure_metrics["decoder_fallbacks"] or 0)
        self._follow_totals(skipped_steps=skipped_steps, fallbacks=fallbacks, rollbacks=rollbacks)
        metrics = monitoring.calculator.compute(step, loss, lr, grad_norm, loss_scale, step_times, process_stats)
        metrics |= self._failure_metrics | self._checkpoint_metrics(metrics)
        metrics |= self._counter_metrics(process_stats) | self._evaluation
        monitoring.node.memory = max_memory([process_stats[rank].memory for rank in monitoring.node.ranks])
        self._save_counters()
        self.log.write_metrics(metrics)
        self.failure_counter.check(step * self._global_batch, failures)

    def log_evaluation(self, step: int, metrics: Metrics, lines: Sequence[str]) -> None:
        """Log an evaluation, record it in the history, and add its metrics to all later log lines."""
        self._evaluation = metrics
        for line in lines:
            self.log.write_message(line)
        self.record_event("evaluation", step=step, **{name: value for name, value in metrics.items() if name != "val_step"})

    def log_failed_evaluation(self, step: int, error: str) -> None:
        """Log an evaluation that failed, and record it in the history."""
        self.log.write_message(f"The evaluation at step {step} failed; training continues: {error}")
        self.record_event("evaluation_failed", step=step, error=error)

    def record_event(self, event: str, **fields: Any) -> None:
        """Append an event to the run's history; see :mod:`scale_mae.runs.history`."""
        if self._world.is_main:
            self._try_to_write(history.FILE, lambda: history.append(self._monitoring.run.dir, event, **fields))

    def count_remaining_time(self) -> None:
        """Count the checkpoint and evaluation time after the last step.

        Call this only if the run ends without an error, because it waits for the device, which may have failed.
        """
        self._observe_phases(self._monitoring.step_timer.read_remainder(), PAUSE_PHASES)

    def record_stop(self, step: int, reason: str) -> None:
        """Log the last save, and record in the history that the processes end."""
        self.log_saves()
        self._save_counters()
        self.record_event("stop", step=step, reason=reason)

    def _read_checkpoint(self, checkpoint: Path | None) -> NewestCheckpoint:
        if checkpoint is None or not self._world.is_main:  # only rank 0 needs it
            return NewestCheckpoint()
        return NewestCheckpoint.read(checkpoint)

    def _gather(self, step: int, stats: ProcessStats | None) -> tuple[list[DecodeFailure], list[ProcessStats]]:
        """Gather decode failures and measurements of all processes, and log and count the failures."""
        gathered = self._world.all_gather((self._failures, self.decoder.fallbacks, stats))
        self._failures = []
        failures = [failure for rank_failures, _, _ in gathered for failure in rank_failures]
        for failure in failures:
            self.log.write_message(str(failure))
        self.failure_counter.add(step * self._global_batch, failures)
        counts = self.failure_counter.counts
        self._failure_metrics = {
            "decode_failures": sum(counts.values()),
            **{f"decode_failures_{cause.name.lower()}": number for cause, number in counts.items()},
            "decoder_fallbacks": sum(fallbacks for _, fallbacks, _ in gathered),
        }
        return failures, [rank_stats for _, _, rank_stats in gathered if rank_stats]

    def _read_step_times(self) -> list[PhaseSeconds]:
        """Return the phase times of the steps since the last call, and count these steps."""
        step_times, counters = self._monitoring.step_timer.read_steps(), self._monitoring.counters
        counters.add("steps", len(step_times))
        counters.add("images", len(step_times) * self._global_batch)
        for seconds in step_times:
            self._observe_phases(seconds, group_phases(seconds))
        return step_times

    def _observe_phases(self, seconds: PhaseSeconds, groups: Iterable[str]) -> None:
        """Add phase times to the histograms. Most steps have no pause phase; a pause of 0 s is not added."""
        group_seconds = group_phases(seconds)
        for group in groups:
            if group_seconds[group] > 0 or group not in PAUSE_PHASES:
                self._monitoring.counters.observe(f"step_seconds/{group}", group_seconds[group])

    def _process_stats(self, step_times: Sequence[PhaseSeconds]) -> ProcessStats:
        previous, self._energy = self._energy, self._monitoring.nvml.energy_joules(self._monitoring.gpu)
        used = None if previous is None or self._energy is None else self._energy - previous
        return ProcessStats(local_seconds(step_times), memory_usage(self._world.device), used)

    def _follow_totals(self, *, skipped_steps: int, fallbacks: int, rollbacks: int) -> None:
        counters = self._monitoring.counters
        counters.follow_total("skipped_steps", skipped_steps)
        counters.follow_total("rollbacks", rollbacks)
        counters.follow_total("decoder_fallbacks", fallbacks)
        counters.follow_total("checkpoint_failures", self.saver.failures)
        for cause in ImageStatus:
            if cause >= ImageStatus.EMPTY:
                counters.follow_total(f"decode_failures/{cause.name.lower()}", self.failure_counter.counts[cause])

    def _checkpoint_metrics(self, metrics: Metrics) -> Metrics:
        newest, now = self._newest_checkpoint, metrics["time"] or 0
        return {
            "checkpoint_step": newest.step,
            "checkpoint_age_s": None if newest.time is None else now - newest.time,
            "checkpoint_duration_s": newest.seconds,
            "checkpoint_bytes": newest.nbytes,
            "checkpoint_interval_s": self._save_interval * (metrics["step_time_s"] or 0),
            "checkpoint_failures": self.saver.failures,
        }

    def _counter_metrics(self, process_stats: Sequence[ProcessStats]) -> Metrics:
        counters, placements = self._monitoring.counters, self._monitoring.node.placements
        for node, gpu in set(placements):
            joules = process_stats[placements.index((node, gpu))].energy  # processes that share a GPU count once
            if joules is not None:
                counters.add(f"gpu_energy/{node}/{gpu}", max(0.0, joules))
        energy = counters.by_label("gpu_energy")
        return {
            "images_processed": int(counters["images"]),
            "steps_done": int(counters["steps"]),
            "skipped_steps": int(counters["skipped_steps"]),
            "checkpoints": int(counters["checkpoints"]),
            "restarts": int(counters["restarts"]),
            "rollbacks": int(counters["rollbacks"]),
            "energy_j": sum(energy.values()) if energy else None,
        }

    def _record_save(self, save: SaveResult) -> None:
        if save.path is None:
            self.record_event("checkpoint", step=save.step, error=str(save.error))
            return
        self._newest_checkpoint = NewestCheckpoint(save.step, time.time(), save.seconds, save.nbytes)
        self._monitoring.counters.add("checkpoints")
        self.record_event(
            "checkpoint", step=save.step, seconds=save.seconds, blocked_seconds=save.blocked_seconds, bytes=save.nbytes
        )

    def _save_counters(self) -> None:
        if self._world.is_main:
            self._try_to_write(COUNTERS_FILE, lambda: self._monitoring.counters.save(self._monitoring.run.dir))

    def _try_to_write(self, name: str, action: Callable[[], None]) -> None:
        """Write a file. An error is reported once until a write succeeds again, and does not stop the run."""
        try:
            action()
        except OSError as error:
            if name not in self._unwritable:
                print_to_stderr(f"{self._monitoring.run.dir / name}: cannot be written ({error.strerror})")
            self._unwritable.add(name)
        else:
            self._unwritable.discard(name)
