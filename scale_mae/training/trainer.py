"""Training from top to bottom: build everything in visible order, then the loop."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from scale_mae.checkpoint.paths import list_checkpoints
from scale_mae.checkpoint.saver import Saver
from scale_mae.checkpoint.size import checkpoint_size
from scale_mae.config import Config, UserError
from scale_mae.data.errors import DataError
from scale_mae.data.failure_counter import FailureCounter
from scale_mae.data.index import Index
from scale_mae.data.loader import BatchShard, Loader
from scale_mae.data.sample_plan import SamplePlan
from scale_mae.data.transforms import normalize
from scale_mae.distributed.process_group import World
from scale_mae.distributed.signals import StopRequest
from scale_mae.distributed.stop_vote import Vote
from scale_mae.engine.deepspeed import Engine
from scale_mae.engine.schedule import build_schedule
from scale_mae.metrics.sinks import print_to_stderr
from scale_mae.runs.directory import prepare_run_directory
from scale_mae.runs.run_index import check_index_unchanged, find_or_build_index
from scale_mae.system.versions import package_versions
from scale_mae.training.anomaly_detector import Anomaly
from scale_mae.training.batch_iterator import BatchIterator, build_decoder
from scale_mae.training.metrics_logger import MetricsLogger
from scale_mae.training.monitoring import build_monitoring, start_facts
from scale_mae.training.rollback import ADVICE, RollbackController
from scale_mae.training.tasks import build_task
from scale_mae.training.time_limit import StopTimeEstimator
from scale_mae.training.watchdog import Watchdog


class NonFiniteError(UserError):
    """A weight became NaN or infinite."""


@dataclass(frozen=True)
class TrainingResult:
    """How a call of :func:`scale_mae.pretrain` and its like ended.

    Attributes:
        run_dir: the run directory.
        step: optimizer steps done.
        finished: whether that is the end of the schedule; if not, the same call continues.
        stopped: what stopped it, such as ``stopped by SIGTERM after step 12``; empty when nothing did.
    """

    run_dir: Path
    step: int
    finished: bool
    stopped: str


class Trainer:
    """The parts of a run, built in the order in which they depend on each other, and the loop over them."""

    def __init__(self, config: Config, world: World, stop: StopRequest, watchdog: Watchdog, said: Sequence[str] = ()) -> None:
        self.config, self.world, self.stop, self.watchdog = config, world, stop, watchdog
        accumulation = config.accumulation(world.size)
        self.dir, notes = Path(config.run.dir), [*said]

        # What there is: the run directory, its newest checkpoint, the images
        checkpoint = world.run_on_main(lambda: prepare_run_directory(self.dir, config, notes))
        path = world.run_on_main(lambda: find_or_build_index(self.dir, config.data.source, notes, stop))
        self.index = index = world.run_on_all(lambda: Index.open(path))

        # What comes when
        self.schedule = build_schedule(config, len(index))
        self.save_every = config.steps(config.checkpoint.interval, len(index))
        plan = SamplePlan(config.run.seed, len(index), config.train.global_batch)
        self.recovery = RollbackController(self.dir, config.rollback, world, plan, index, self._say, resumed=bool(checkpoint))

        # The model and its engine, at the step where the run stands
        self.task = build_task(config, index, world, notes, resumed=bool(checkpoint))
        parameters = sum(p.numel() for p in self.task.model.parameters())
        self.engine = Engine(self.task.model, config, world)
        self.step = self.saved = failed_saves = 0
        recent_saves: list[float] = []
        measured: dict[str, Any] | None = None
        self.tally = FailureCounter(config.data.max_failure_ratio)
        if checkpoint:
            state = self._load(checkpoint)
            failed_saves, recent_saves = int(state["failed_saves"]), state["recent_saves_s"]
            measured = state.get("metrics")
            notes.append(f"resumed from {checkpoint}")
        max_bytes, main_only_bytes = checkpoint_size(parameters, config.train.precision, self.engine.zero_stage)
        sizes = {"zero_stage": self.engine.zero_stage, "max_bytes": max_bytes, "main_only_bytes": main_only_bytes}
        keep_interval = config.steps(config.checkpoint.keep_interval, len(index)) if config.checkpoint.keep_interval else None
        self.saver = Saver(self.dir, config, world, **sizes, keep_interval=keep_interval, failures=failed_saves)
        self.pace = StopTimeEstimator(16 * parameters, recent_saves)

        # Batches, measurements, and where they are told
        pin_memory = world.device.type == "cuda"
        share = BatchShard(world.rank, world.size, config.train.micro_batch, accumulation)
        decoder, chosen, why = build_decoder(config, world)
        shape, warn = (config.model.image_size, self.task.num_patches), functools.partial(_warn, world.rank)
        self.loader = Loader(index, self.recovery.plan, share, config.data, decoder, *shape, pin_memory, warn)
        instruments = build_monitoring(
            config, world, self.task.model, len(index), self.schedule.total_steps, self.step, measured
        )
        self.watch, self.log = instruments.watch, instruments.log
        told = (instruments, world, self.tally, self.saver, self.pace, decoder, self.save_every, checkpoint)
        self.teller = MetricsLogger(*told, self.engine.skipped_steps, self.recovery.rollbacks)
        self.teller.record(
            "start", step=self.step, **start_facts(instruments, world, self.engine.zero_stage, package_versions())
        )
        notes.append(
            f"{self.task.what}, on {len(index)} images, {world.size} processes on {world.device.type}, "
            f"{config.train.precision}, ZeRO-{self.engine.zero_stage}, data.decoder={chosen} ({why}): "
            f"steps {self.step} to {self.schedule.total_steps} of {config.train.global_batch} images "
            f"({accumulation} x {config.train.micro_batch} a process), "
            f"peak learning rate {config.peak_lr:.3g}; run directory {self.dir}"
        )
        for note in notes:
            self.log.write_message(note)

    def _load(self, checkpoint: Path) -> dict[str, Any]:
        """Stand where a checkpoint stands; its state."""
        state = self.engine.load(checkpoint)
        check_index_unchanged(state["data"], self.index, checkpoint)
        self.step = self.saved = int(state["step"])
        self.tally = FailureCounter(self.config.data.max_failure_ratio, state["failures"])
        self.recovery.restore(state.get("recovery"))
        self.task.restore(state)
        return state

    def _say(self, message: str) -> None:
        self.log.write_message(message)

    def loop(self) -> TrainingResult:
        """Step until the schedule ends or a signal comes; a checkpoint is the last thing written."""
        total, stopped, vote = self.schedule.total_steps, "", Vote.CONTINUE
        with self.log, ExitStack() as last, self.saver:
            last.push(lambda _, error, __: self.teller.end(self.step, stopped or str(error or "finished")))
            while self.step < total and vote is Vote.CONTINUE:
                vote = self._train()
                if self.recovery.verdict:
                    self._go_back(self.recovery.verdict)
            self._save()
            self.watchdog.beat()
            self.saver.wait()
            self.teller.saves()
            self.teller.rest()
            if self.stop.reason or vote is Vote.STOP:
                stopped = f"stopped by {self.stop.reason or 'a signal on another process'} after step {self.step}"
                self.log.write_message(stopped)
            if self.saver.error:
                raise self.saver.error
            if self.world.is_main and (saved := list_checkpoints(self.dir)):
                self.task.saved(saved[-1])
        return TrainingResult(self.dir, self.step, self.step >= total, stopped)

    def _train(self) -> Vote:
        """Step until the schedule ends, a signal comes, or the run has gone bad."""
        total, recovery, vote, due = self.schedule.total_steps, self.recovery, Vote.CONTINUE, False
        with BatchIterator(self.loader.batches(self.step, total), self.world, self.stop, self.watch) as feed:
            try:
                while self.step < total and vote is Vote.CONTINUE and not recovery.verdict:
                    self.stop.lead_seconds, began = self.pace.lead_seconds, time.perf_counter()
                    vote = self._one_step(feed)
                    self.pace.stepped(time.perf_counter() - began)
                    due = due or self.step % self.save_every == 0
                    if due or vote is Vote.STOP:
                        recovery.judge()
                    if due and not recovery.health.suspicious:  # else when it is known what these steps are worth
                        self._save()
                        due = False
            except DataError:
                if not recovery.judge():
                    self._save()  # the steps before the bad image are sound
                raise
        return vote

    def _one_step(self, feed: BatchIterator) -> Vote:
        """One optimizer step. Nothing here waits for the accelerator unless the step is logged."""
        step, config, world = self.step, self.config, self.world
        lr = self.schedule.lr(step)
        accumulation, loss, norm, vote = (
            config.accumulation(world.size),
            torch.zeros((), device=world.device),
            None,
            Vote.CONTINUE,
        )
        logged = (step + 1) % config.log.interval == 0 or step + 1 == self.schedule.total_steps
        for micro_step in range(accumulation):
            batch, each = feed.take()
            vote = max(vote, each)
            images = batch.images.to(world.device, non_blocking=True)
            jitter = None if batch.color_jitter is None else batch.color_jitter.to(world.device, non_blocking=True)
            images = normalize(images, config.data.mean, config.data.std, jitter)
            self.teller.add(batch.failures)
            loss += self.engine.forward_backward(*self.task.inputs(batch, images)) / accumulation
            self.watch.mark("backward")
            norm = self.engine.step(lr, return_norm=logged and micro_step + 1 == accumulation)
            self.watch.mark("optimizer")
            feed.advance()
        self.step += 1
        self.recovery.add(self.step, loss, self.engine.last_step_skipped)
        self.watchdog.beat()
        self.watch.end_step()
        if self.task.due(self.step, self.schedule.total_steps):
            self._judge()
        if logged:
            self.recovery.judge()
            counts = self.engine.skipped_steps, self.recovery.rollbacks
            self.teller.step(self.step, self.recovery.loss, lr, norm, self.engine.loss_scale, *counts)
        return vote

    def _judge(self) -> None:
        """How good the model is by now."""
        self.watch.mark("other")
        try:
            metrics, lines = self.task.judge(self.engine, self.step, self._beat)
        except UserError as error:  # of the images to evaluate on, which end no run
            self.teller.not_judged(self.step, str(error))
        else:
            self.teller.judged(self.step, metrics, lines)
        self.watch.mark("evaluation")

    def _beat(self) -> None:
        """Whoever looks for progress, here and from outside, is to see some."""
        self.watchdog.beat()
        self.watch.record_progress()

    def _go_back(self, verdict: Anomaly) -> None:
        """To the last good checkpoint, to go on without the images that led to a verdict.

        Raises:
            RollbackError: that is not possible, or was done often enough.
        """
        notes: list[str] = []
        self.watch.mark("other")
        self.teller.failures(self.step)
        self.saver.wait()
        self.teller.saves()
        self.watchdog.beat()
        try:
            checkpoint = self.recovery.go_back(verdict, self.step, notes)
        finally:
            for note in notes:
                self.log.write_message(note)
        self.watchdog.beat()
        state = self._load(checkpoint)
        self.watchdog.beat()
        decoder, _, _ = build_decoder(self.config, self.world)  # its loader has closed the old one
        self.teller.went_back(checkpoint, state.get("metrics") or {}, self.tally, decoder)
        self.loader = replace(self.loader, plan=self.recovery.plan, decoder=decoder)
        self.watch.mark("checkpoint")  # training stood still

    def _save(self) -> None:
        """Write a checkpoint of the present step, unless there is one or the run has gone bad."""
        self.teller.failures(self.step)
        if self.step == self.saved:
            return
        self.watch.mark("other")
        self.saver.wait()  # what the last one came to belongs into this one
        self.teller.saves()
        if not all(self.world.all_gather(self.engine.weights_are_finite())):
            whole = [None, *list_checkpoints(self.dir)]  # saves that were lost are none of them
            raise NonFiniteError(
                f"weights are not finite after step {self.step}; nothing saved from it (last checkpoint: {whole[-1]}); {ADVICE}"
            )
        state = {
            "step": self.step,
            "data": self.index.digest,
            "failures": self.tally.state_dict(),
            "failed_saves": self.saver.failures,
            "recent_saves_s": list(self.pace.saves),
            "metrics": self.teller.state(),
            "recovery": self.recovery.state(),
            **self.task.state(),
        }
        self.watchdog.beat()  # a save has as long as a step
        # steps whose worth is not known yet, saved at the end or on a signal, must not cost the ones before them
        keep_all = self.recovery.health.suspicious
        self.saver.save(self.step, lambda folder: self.engine.save(folder, state), keep_all=keep_all)
        self.saved = self.step
        self.watchdog.beat()
        self.watch.mark("checkpoint")
        self.teller.saves()


def _warn(rank: int, message: str) -> None:
    """From any process and thread, at once."""
    print_to_stderr(f"rank {rank}: {message}")
