"""What a run tells of itself: images that had to be replaced, saves, the metrics of a log step, and its history."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_mae.checkpoint.manifest import read_manifest
from scale_mae.checkpoint.paths import MANIFEST_FILE, step_of
from scale_mae.checkpoint.saver import Saver, SaveResult
from scale_mae.data.decoders import Decoder
from scale_mae.data.errors import ImageStatus
from scale_mae.data.failure_counter import DecodeFailure, FailureCounter
from scale_mae.distributed.process_group import World
from scale_mae.metrics.calculator import Metrics, ProcessStats, local_seconds
from scale_mae.metrics.memory import max_memory, memory_usage
from scale_mae.metrics.sinks import print_to_stderr
from scale_mae.metrics.step_timer import PAUSE_PHASES, PhaseSeconds, group_phases
from scale_mae.runs import history
from scale_mae.training.monitoring import Monitoring
from scale_mae.training.time_limit import StopTimeEstimator


@dataclass
class NewestCheckpoint:
    """The newest checkpoint. None: not known, or there is none."""

    step: int | None = None
    time: float | None = None
    seconds: float | None = None
    nbytes: int | None = None

    @classmethod
    def of(cls, checkpoint: Path | None) -> NewestCheckpoint:
        """What a checkpoint that was found says of itself."""
        if checkpoint is None:
            return cls()
        files = read_manifest(checkpoint).files.values()
        made = (checkpoint / MANIFEST_FILE).stat().st_mtime
        return cls(step_of(checkpoint), made, None, sum(int(facts["bytes"]) for facts in files))


class MetricsLogger:
    """Gathers from all processes and tells on the first one. All processes call the same methods at the same steps.

    Args:
        instruments: what is measured, and where it is told.
        world: the processes.
        tally: of replaced images.
        saver: asked how its saves ended.
        pace: told how long they took.
        decoder: asked for its fallbacks.
        save_every: steps between checkpoints.
        newest: the checkpoint that the run goes on from.
        skipped_steps: so far; see :meth:`step`.
        rollbacks: likewise.
    """

    def __init__(
        self,
        instruments: Monitoring,
        world: World,
        tally: FailureCounter,
        saver: Saver,
        pace: StopTimeEstimator,
        decoder: Decoder,
        save_every: int,
        newest: Path | None,
        skipped_steps: int,
        rollbacks: int,
    ) -> None:
        self._instruments, self._world, self.decoder = instruments, world, decoder
        self.log, self.tally, self.saver, self.pace = instruments.log, tally, saver, pace
        self._save_every, self._newest = save_every, self._find(newest)
        self._global_batch = instruments.calculator.global_batch
        self._failures: list[DecodeFailure] = []
        self._failure_metrics: Metrics = {}
        self._judged: Metrics = {}  # the newest evaluation
        self._laps: list[PhaseSeconds] = []  # of steps since the last log line
        self._energy = instruments.nvml.energy_joules(instruments.gpu)
        self._lost: set[str] = set()  # files that could not be written, told once
        self._follow(skipped_steps, 0, rollbacks)
        self._persist()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return self._instruments.state()

    def went_back(self, checkpoint: Path, state: Mapping[str, Any], tally: FailureCounter, decoder: Decoder) -> None:
        """The run goes on from an earlier checkpoint: what is counted goes on, what is known of its state does not.

        Args:
            checkpoint: now the newest.
            state: what it keeps of :meth:`state`.
            tally: as of then.
            decoder: a new one.
        """
        self._instruments.calculator.restore(state)
        decoder.fallbacks = self.decoder.fallbacks
        self._newest, self.tally, self.decoder = self._find(checkpoint), tally, decoder

    def _find(self, checkpoint: Path | None) -> NewestCheckpoint:
        return (
            NewestCheckpoint.of(checkpoint) if self._world.is_main else NewestCheckpoint()
        )  # a file that a thousand need not read

    def add(self, failures: Sequence[DecodeFailure]) -> None:
        """Remember what this process had to replace."""
        self._failures += failures

    def failures(self, step: int) -> list[DecodeFailure]:
        """Name and count the images of all processes that had to be replaced since the last call, and the steps."""
        self._laps += self._count()
        return self._gather(step, None)[0]

    def saves(self) -> None:
        """Tell of the saves that have ended since the last call."""
        for saved in self.saver.take_results():
            self.pace.saved(saved.seconds)
            stall = (
                f"; training stood still for {saved.blocked_seconds:.1f} s of it"
                if saved.blocked_seconds < saved.seconds
                else ""
            )
            told = f"saved {saved.path} in {saved.seconds:.1f} s{stall}"
            self.log.write_message(f"checkpoint lost, {self.saver.failures} so far: {saved.error}" if saved.error else told)
            for note in saved.messages:
                self.log.write_message(note)
            self._saved(saved)
            self._persist()  # what a kill must not take back

    def step(
        self, step: int, loss: float, lr: float, norm: float | None, loss_scale: float, skipped_steps: int, rollbacks: int
    ) -> None:
        """The metrics of a log step; see :meth:`MetricsCalculator.compute`. ``rollbacks``: times that the run has gone
        back.

        Raises:
            DataError: more images were replaced than ``data.max_failure_ratio`` allows.
        """
        instruments, laps = self._instruments, self._laps + self._count()
        self._laps = []
        failures, vitals = self._gather(step, self._vitals(laps))
        self.saves()
        self._follow(skipped_steps, int(self._failure_metrics["decoder_fallbacks"] or 0), rollbacks)
        metrics = instruments.calculator.compute(step, loss, lr, norm, loss_scale, laps, vitals)
        metrics |= self._failure_metrics | self._checkpoint_metrics(metrics) | self._counted(vitals) | self._judged
        instruments.node.memory = max_memory([vitals[rank].memory for rank in instruments.node.ranks])
        self._persist()
        self.log.write_metrics(metrics)
        self.tally.check(step * self._global_batch, failures)

    def judged(self, step: int, metrics: Metrics, lines: Sequence[str]) -> None:
        """The model was evaluated: told to people and to the history now, and with every log line from now on."""
        self._judged = metrics
        for line in lines:
            self.log.write_message(line)
        self.record("evaluation", step=step, **{name: value for name, value in metrics.items() if name != "val_step"})

    def not_judged(self, step: int, why: str) -> None:
        """An evaluation failed."""
        self.log.write_message(f"step {step}: not evaluated, training goes on: {why}")
        self.record("evaluation_failed", step=step, error=why)

    def record(self, event: str, **facts: Any) -> None:
        """Add to the run's history; see :mod:`scale_mae.runs.history`."""
        if self._world.is_main:
            self._write(history.FILE, lambda: history.append(self._instruments.run.dir, event, **facts))

    def rest(self) -> None:
        """Count what followed the last step. Of a run that ends in order: this waits for the device, which may have failed."""
        self._observe(self._instruments.watch.read_remainder(), PAUSE_PHASES)

    def end(self, step: int, reason: str) -> None:
        """The run stops here, whatever ended it."""
        self.saves()  # of the save that was under way
        self._persist()
        self.record("stop", step=step, reason=reason)

    def _gather(self, step: int, vitals: ProcessStats | None) -> tuple[list[DecodeFailure], list[ProcessStats]]:
        found = self._world.all_gather((self._failures, self.decoder.fallbacks, vitals))
        self._failures = []
        failures = [failure for failures, _, _ in found for failure in failures]
        for failure in failures:
            self.log.write_message(str(failure))
        self.tally.add(step * self._global_batch, failures)
        self._failure_metrics = {
            "decode_failures": sum(self.tally.counts.values()),
            **{f"decode_failures_{cause.name.lower()}": number for cause, number in self.tally.counts.items()},
            "decoder_fallbacks": sum(fallbacks for _, fallbacks, _ in found),
        }
        return failures, [vital for _, _, vital in found if vital]

    def _count(self) -> list[PhaseSeconds]:
        """Laps of the steps since the last call, counted."""
        laps, counters = self._instruments.watch.read_steps(), self._instruments.counters
        counters.add("steps", len(laps))
        counters.add("images", len(laps) * self._global_batch)
        for step_laps in laps:
            self._observe(step_laps, group_phases(step_laps))
        return laps

    def _observe(self, laps: PhaseSeconds, wanted: Iterable[str]) -> None:
        found = group_phases(laps)
        for phase in wanted:
            if found[phase] > 0 or phase not in PAUSE_PHASES:
                self._instruments.counters.observe(f"step_seconds/{phase}", found[phase])

    def _vitals(self, laps: Sequence[PhaseSeconds]) -> ProcessStats:
        before, self._energy = self._energy, self._instruments.nvml.energy_joules(self._instruments.gpu)
        used = None if before is None or self._energy is None else self._energy - before
        return ProcessStats(local_seconds(laps), memory_usage(self._world.device), used)

    def _follow(self, skipped_steps: int, fallbacks: int, rollbacks: int) -> None:
        counters = self._instruments.counters
        counters.follow_total("skipped_steps", skipped_steps)
        counters.follow_total("rollbacks", rollbacks)
        counters.follow_total("decoder_fallbacks", fallbacks)
        counters.follow_total("checkpoint_failures", self.saver.failures)
        for cause in ImageStatus:
            if cause >= ImageStatus.EMPTY:
                counters.follow_total(f"decode_failures/{cause.name.lower()}", self.tally.counts[cause])

    def _checkpoint_metrics(self, metrics: Metrics) -> Metrics:
        newest, now = self._newest, metrics["time"] or 0
        return {
            "checkpoint_step": newest.step,
            "checkpoint_age_s": None if newest.time is None else now - newest.time,
            "checkpoint_duration_s": newest.seconds,
            "checkpoint_bytes": newest.nbytes,
            "checkpoint_interval_s": self._save_every * (metrics["step_time_s"] or 0),
            "checkpoint_failures": self.saver.failures,
        }

    def _counted(self, vitals: Sequence[ProcessStats]) -> Metrics:
        counters, placements = self._instruments.counters, self._instruments.node.placements
        for place in set(placements):
            joules = vitals[placements.index(place)].energy  # a GPU that processes share counts once
            if joules is not None:
                counters.add(f"gpu_energy/{place[0]}/{place[1]}", max(0.0, joules))
        energy = [value for name, value in counters.values.items() if name.startswith("gpu_energy/")]
        return {
            "images_processed": int(counters["images"]),
            "steps_done": int(counters["steps"]),
            "skipped_steps": int(counters["skipped_steps"]),
            "checkpoints": int(counters["checkpoints"]),
            "restarts": int(counters["restarts"]),
            "rollbacks": int(counters["rollbacks"]),
            "energy_j": sum(energy) if energy else None,
        }

    def _saved(self, saved: SaveResult) -> None:
        if saved.path is None:
            self.record("checkpoint", step=saved.step, error=str(saved.error))
            return
        self._newest = NewestCheckpoint(saved.step, time.time(), saved.seconds, saved.nbytes)
        self._instruments.counters.add("checkpoints")
        self.record(
            "checkpoint", step=saved.step, seconds=saved.seconds, blocked_seconds=saved.blocked_seconds, bytes=saved.nbytes
        )

    def _persist(self) -> None:
        if self._world.is_main:
            self._write("counters.json", lambda: self._instruments.counters.save(self._instruments.run.dir))

    def _write(self, name: str, action: Any) -> None:
        """A file that cannot be written is told once, and stops nothing."""
        try:
            action()
        except OSError as error:
            if name not in self._lost:
                print_to_stderr(f"{self._instruments.run.dir / name}: cannot be written ({error.strerror})")
            self._lost.add(name)
        else:
            self._lost.discard(name)
