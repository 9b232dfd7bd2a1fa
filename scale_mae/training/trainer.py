"""The training of a run from top to bottom: ``Trainer.__init__`` builds all parts in order, ``Trainer.train`` is the loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from scale_mae.checkpoint.paths import list_checkpoints
from scale_mae.checkpoint.saver import Saver
from scale_mae.checkpoint.size import estimate_checkpoint_size
from scale_mae.config import Config, UserError
from scale_mae.data.errors import DataError
from scale_mae.data.failure_counter import FailureCounter
from scale_mae.data.index import Index
from scale_mae.data.sample_plan import SamplePlan
from scale_mae.data.transforms import normalize
from scale_mae.distributed.process_group import World
from scale_mae.distributed.signals import StopRequest
from scale_mae.distributed.stop_vote import Vote
from scale_mae.engine.deepspeed import Engine
from scale_mae.engine.schedule import build_schedule
from scale_mae.runs.directory import prepare_run_directory
from scale_mae.runs.run_index import check_index_unchanged, find_or_build_index
from scale_mae.training.anomaly_detector import Anomaly
from scale_mae.training.batch_iterator import BatchIterator, build_loader
from scale_mae.training.metrics_logger import MetricsLogger
from scale_mae.training.monitoring import build_monitoring, build_start_event, describe_settings
from scale_mae.training.result import TrainingResult
from scale_mae.training.rollback import RollbackController
from scale_mae.training.tasks import build_task
from scale_mae.training.time_limit import StopTimeEstimator
from scale_mae.training.watchdog import Watchdog


class Trainer:
    """The parts of a run, built in the order in which they depend on each other, and the training loop.

    Args:
        config: The configuration of the run.
        world: The process group.
        stop: Requests to stop.
        watchdog: Gets reports of progress.
        messages: Messages for the log, which does not exist yet.
    """

    def __init__(
        self, config: Config, world: World, stop: StopRequest, watchdog: Watchdog, messages: Sequence[str] = ()
    ) -> None:
        self.config, self.world, self.stop, self.watchdog = config, world, stop, watchdog
        self.accumulation_steps = config.accumulation(world.size)
        self.run_dir, messages = Path(config.run.dir), [*messages]

        # Run directory and index of the images
        checkpoint = world.run_on_main(lambda: prepare_run_directory(self.run_dir, config, messages))
        index_path = world.run_on_main(lambda: find_or_build_index(self.run_dir, config.data.source, messages, stop))
        self.index = world.run_on_all(lambda: Index.open(index_path))
        dataset_size, resumed = len(self.index), checkpoint is not None

        # Schedule, order of the samples, and rollback, which changes that order
        self.schedule = build_schedule(config, dataset_size)
        self.save_interval = config.steps(config.checkpoint.interval, dataset_size)
        plan = SamplePlan(config.run.seed, dataset_size, config.train.global_batch)
        self.rollback = RollbackController(
            self.run_dir, config.rollback, world, plan, self.index, self._log_message, resumed=resumed
        )

        # Model and DeepSpeed engine, at the step of the checkpoint
        self.task = build_task(config, self.index, world, messages, resumed=resumed)
        num_parameters = sum(p.numel() for p in self.task.model.parameters())
        self.engine = Engine(self.task.model, config, world)
        self.step = self.saved_step = 0
        self.failure_counter = FailureCounter(config.data.max_failure_ratio)
        state = self._load_checkpoint(checkpoint) if checkpoint else {}

        # Saver, and the time that its saves need at the end of the job
        max_bytes, main_only_bytes = estimate_checkpoint_size(num_parameters, config.train.precision, self.engine.zero_stage)
        keep_interval = config.steps(config.checkpoint.keep_interval, dataset_size) if config.checkpoint.keep_interval else None
        self.saver = Saver(
            self.run_dir,
            config,
            world,
            zero_stage=self.engine.zero_stage,
            max_bytes=max_bytes,
            main_only_bytes=main_only_bytes,
            keep_interval=keep_interval,
            failures=state.get("failed_saves", 0),
        )
        self.stop_time = StopTimeEstimator(16 * num_parameters, state.get("recent_save_seconds", ()))

        # Data loader, monitoring and logging
        self.loader, loader_message = build_loader(config, world, self.index, self.rollback.plan, self.task.num_patches)
        self.monitoring = build_monitoring(
            config, world, self.task.model, dataset_size, self.schedule.total_steps, step=self.step, state=state.get("metrics")
        )
        self.step_timer, self.log = self.monitoring.step_timer, self.monitoring.log
        self.metrics_logger = self._build_metrics_logger(checkpoint)
        self._log_start([*messages, loader_message], checkpoint)

    def train(self) -> TrainingResult:
        """Train until the schedule ends or the run must stop, and save a checkpoint of the last step."""
        total_steps, stopped, vote = self.schedule.total_steps, "", Vote.CONTINUE
        with self.log, ExitStack() as at_exit, self.saver:
            at_exit.push(lambda _, error, __: self.metrics_logger.record_stop(self.step, stopped or str(error or "finished")))
            while self.step < total_steps and vote is Vote.CONTINUE:
                vote = self._train_steps()
                if self.rollback.anomaly:
                    self._roll_back(self.rollback.anomaly)
            self._save_checkpoint()
            self.watchdog.report_progress()
            self.saver.wait()
            self.metrics_logger.log_saves()
            self.metrics_logger.count_remaining_time()
            if self.stop.reason or vote is Vote.STOP:
                stopped = f"stopped by {self.stop.reason or 'a signal to another process'} after step {self.step}"
                self._log_message(f"Run {stopped}.")
            if self.saver.error:
                raise self.saver.error
            if self.world.is_main and (saved := list_checkpoints(self.run_dir)):
                self.task.on_checkpoint_saved(saved[-1])
            if not stopped:
                self._log_message(f"Run finished after step {self.step}.")
        return TrainingResult(self.run_dir, self.step, self.step >= total_steps, stopped)

    def _train_steps(self) -> Vote:
        """Train until the schedule ends, the run must stop, or there is an anomaly. Return the last vote."""
        total_steps, rollback, vote, save_is_due = self.schedule.total_steps, self.rollback, Vote.CONTINUE, False
        with BatchIterator(self.loader.batches(self.step, total_steps), self.world, self.stop, self.step_timer) as batches:
            try:
                while self.step < total_steps and vote is Vote.CONTINUE and not rollback.anomaly:
                    self.stop.lead_seconds, start = self.stop_time.lead_seconds, time.perf_counter()
                    vote = self.train_step(batches)
                    self.stop_time.add_step(time.perf_counter() - start)
                    save_is_due = save_is_due or self.step % self.save_interval == 0
                    if save_is_due or vote is Vote.STOP:
                        rollback.check()
                    if save_is_due and not rollback.detector.suspicious:  # else wait until the steps prove good or bad
                        self._save_checkpoint()
                        save_is_due = False
            except DataError:
                if not rollback.check():
                    self._save_checkpoint()  # the steps before the data error are good
                raise
        return vote

    def train_step(self, batches: BatchIterator) -> Vote:
        """Do one optimizer step. Nothing here waits for the accelerator unless the step is logged."""
        config, device = self.config, self.world.device
        lr = self.schedule.lr(self.step)
        is_logged = (self.step + 1) % config.log.interval == 0 or self.step + 1 == self.schedule.total_steps
        loss, grad_norm, vote = torch.zeros((), device=device), None, Vote.CONTINUE
        for micro_step in range(self.accumulation_steps):
            batch, batch_vote = batches.take()
            vote = max(vote, batch_vote)
            images = batch.images.to(device, non_blocking=True)
            jitter = None if batch.color_jitter is None else batch.color_jitter.to(device, non_blocking=True)
            images = normalize(images, config.data.mean, config.data.std, jitter)
            self.metrics_logger.add_decode_failures(batch.failures)
            loss += self.engine.forward_backward(*self.task.model_inputs(batch, images)) / self.accumulation_steps
            self.step_timer.mark("backward")
            grad_norm = self.engine.step(lr, return_norm=is_logged and micro_step + 1 == self.accumulation_steps)
            self.step_timer.mark("optimizer")
            batches.fetch_next()
        self.step += 1
        self.rollback.add_step(self.step, loss, self.engine.last_step_skipped)
        self.watchdog.report_progress()
        self.step_timer.end_step()
        if self.task.should_evaluate(self.step, self.schedule.total_steps):
            self._evaluate()
        if is_logged:
            self.rollback.check()
            self.metrics_logger.log_step(
                step=self.step,
                loss=self.rollback.last_loss,
                lr=lr,
                grad_norm=grad_norm,
                loss_scale=self.engine.loss_scale,
                skipped_steps=self.engine.skipped_steps,
                rollbacks=self.rollback.num_rollbacks,
            )
        return vote

    def _evaluate(self) -> None:
        """Evaluate the model. An unreadable validation image does not end the run."""
        self.step_timer.mark("other")
        try:
            metrics, lines = self.task.evaluate(self.engine, self.step, self._report_progress)
        except UserError as error:
            self.metrics_logger.log_failed_evaluation(self.step, str(error))
        else:
            self.metrics_logger.log_evaluation(self.step, metrics, lines)
        self.step_timer.mark("evaluation")

    def _report_progress(self) -> None:
        """Report progress to the watchdog and to external monitors."""
        self.watchdog.report_progress()
        self.step_timer.record_progress()

    def _save_checkpoint(self) -> None:
        """Save a checkpoint of the current step, unless there is one. This fails if a weight is not finite."""
        self.metrics_logger.log_decode_failures(self.step)
        if self.step == self.saved_step:
            return
        self.step_timer.mark("other")
        self.saver.wait()  # the new checkpoint contains the result of the previous save
        self.metrics_logger.log_saves()
        self.rollback.check_weights(self.engine.weights_are_finite(), self.step)
        state = {
            "step": self.step,
            "data": self.index.digest,
            "failures": self.failure_counter.state_dict(),
            "failed_saves": self.saver.failures,
            "recent_save_seconds": list(self.stop_time.save_seconds),
            "metrics": self.metrics_logger.state(),
            "rollback": self.rollback.state(),
            **self.task.state(),
        }
        self.watchdog.report_progress()  # a save has the same time limit as a step
        # At the end or on a stop request, the last steps may be suspicious. Then keep all checkpoints before them.
        keep_all = self.rollback.detector.suspicious
        self.saver.save(self.step, lambda folder: self.engine.save(folder, state), keep_all=keep_all)
        self.saved_step = self.step
        self.watchdog.report_progress()
        self.step_timer.mark("checkpoint")
        self.metrics_logger.log_saves()

    def _load_checkpoint(self, checkpoint: Path) -> dict[str, Any]:
        """Restore the engine and the other parts from a checkpoint. Return its state."""
        state = self.engine.load(checkpoint)
        check_index_unchanged(state["data"], self.index, checkpoint)
        self.step = self.saved_step = int(state["step"])
        self.failure_counter = FailureCounter(self.config.data.max_failure_ratio, state["failures"])
        self.rollback.restore(state["rollback"])
        self.task.restore(state)
        return state

    def _roll_back(self, anomaly: Anomaly) -> None:
        """Return to the last good checkpoint, and continue without the images that led to the anomaly.

        Raises:
            RollbackError: A rollback is not possible or not allowed.
        """
        self.step_timer.mark("other")
        self.metrics_logger.log_decode_failures(self.step)
        self.saver.wait()
        self.metrics_logger.log_saves()
        self.watchdog.report_progress()
        checkpoint = self.rollback.roll_back(anomaly, self.step)
        self.watchdog.report_progress()
        state = self._load_checkpoint(checkpoint)
        self.watchdog.report_progress()
        self.loader, _ = build_loader(self.config, self.world, self.index, self.rollback.plan, self.task.num_patches)
        self.metrics_logger.roll_back(checkpoint, state["metrics"], self.failure_counter, self.loader.decoder)
        self.step_timer.mark("checkpoint")

    def _build_metrics_logger(self, checkpoint: Path | None) -> MetricsLogger:
        return MetricsLogger(
            monitoring=self.monitoring,
            world=self.world,
            failure_counter=self.failure_counter,
            saver=self.saver,
            stop_time=self.stop_time,
            decoder=self.loader.decoder,
            save_interval=self.save_interval,
            newest_checkpoint=checkpoint,
            skipped_steps=self.engine.skipped_steps,
            rollbacks=self.rollback.num_rollbacks,
        )

    def _log_start(self, messages: Sequence[str], checkpoint: Path | None) -> None:
        """Record the start in the history, and log the messages and the settings of the run."""
        zero_stage, total_steps = self.engine.zero_stage, self.schedule.total_steps
        self.metrics_logger.record_event("start", step=self.step, **build_start_event(self.monitoring, self.world, zero_stage))
        start = f"Resumed from {checkpoint} at step" if checkpoint else f"Starting in {self.run_dir} from step"
        settings = describe_settings(self.config, self.world, self.task.description, zero_stage)
        for message in [*messages, f"{start} {self.step} of {total_steps}: {settings}."]:
            self._log_message(message)

    def _log_message(self, message: str) -> None:
        self.log.write_message(message)
