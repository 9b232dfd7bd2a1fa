"""Rollback: a run with an anomaly returns to its last good checkpoint and skips the images that led to the anomaly.

The skipped positions are a line of ``history.jsonl`` that is on disk before the run continues. So a run that resumes
later, from any checkpoint, skips the same positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_mae.checkpoint.discovery import find_latest_valid, rename_as_damaged
from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.checkpoint.paths import get_step, list_checkpoints
from scale_mae.config import UserError
from scale_mae.config.schema import RollbackConfig
from scale_mae.data.index import Index
from scale_mae.data.sample_plan import SamplePlan
from scale_mae.distributed.process_group import World
from scale_mae.runs import history
from scale_mae.training.anomaly_detector import Anomaly, AnomalyDetector

ADVICE = "Lower optim.base_lr, set optim.clip_grad_norm, or use train.precision=bf16"
RECORDED_SAMPLES, PRINTED_SAMPLES = 20, 3  # samples in the history, and in a message


class RollbackError(UserError):
    """A run with an anomaly cannot roll back: it has no checkpoint to return to, or no rollback left."""


class NonFiniteError(UserError):
    """A weight is NaN or infinite."""


class RollbackController:
    """Checks the steps of a run, and rolls the run back. All processes call the same methods at the same steps.

    Args:
        run_dir: Run directory.
        config: What an anomaly is, and how many rollbacks are allowed.
        world: The process group.
        plan: The sample plan without skipped positions.
        index: The index of the images.
        log_message: Called with messages for the log.
        resumed: Whether the run resumes from a checkpoint. If not, rollbacks of an earlier run in the same directory do
            not count.

    Attributes:
        plan: The sample plan with the positions that the run skips.
        detector: The anomaly detector, up to the last step that :meth:`check` read.
        anomaly: The anomaly that :meth:`check` found, until the run rolls back.
        num_rollbacks: Number of rollbacks so far.
        last_loss: Loss of the last step that :meth:`check` read.
    """

    def __init__(
        self,
        run_dir: Path,
        config: RollbackConfig,
        world: World,
        plan: SamplePlan,
        index: Index,
        log_message: Callable[[str], None],
        *,
        resumed: bool,
    ) -> None:
        self.plan, self.detector, self.last_loss = plan, AnomalyDetector(config), float("nan")
        self.anomaly: Anomaly | None = None
        self._run_dir, self._config, self._world, self._index = run_dir, config, world, index
        self._log_message = log_message
        self._unread_steps: list[int] = []
        self._unread_values: list[Tensor] = []
        self._past: list[dict[str, Any]] = world.run_on_main(lambda: read_rollbacks(run_dir)) if resumed else []
        self.num_rollbacks = len(self._past)
        for event in self._past:
            self.plan = self.plan.skip(*event["positions"])

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "detector": self.detector.state(),
            "skipped_positions": [list(positions) for positions in self.plan.skipped],
            "num_rollbacks": self.num_rollbacks,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the :meth:`state` of a checkpoint."""
        self.detector, self.anomaly = AnomalyDetector(self._config, state["detector"]), None
        # the history has these rollbacks as well, unless somebody deleted it
        self.num_rollbacks = max(self.num_rollbacks, state["num_rollbacks"])
        for first, stop in state["skipped_positions"]:
            self.plan = self.plan.skip(first, stop)

    def add_step(self, step: int, loss: Tensor, skipped: Tensor) -> None:
        """Keep the values of a step on the device until :meth:`check` reads them.

        Args:
            step: Number of the step, counted from 1.
            loss: Loss of this process, a scalar.
            skipped: 1 if the step was skipped, else 0; a scalar, the same on all processes.
        """
        self._unread_steps.append(step)
        self._unread_values.append(torch.stack([loss, skipped]))

    def check(self) -> Anomaly | None:
        """Check the steps since the last call, and return the anomaly of the run, if any. This waits for the accelerator."""
        steps, values = self._unread_steps, self._unread_values
        self._unread_steps, self._unread_values = [], []
        if not steps:
            return self.anomaly
        # Summed in fp64, so that the result does not depend on how many steps are summed at once.
        sums = torch.stack(values).double().flatten()
        means = (torch.tensor(self._world.all_reduce_sum(sums)).view(-1, 2) / self._world.size).float().tolist()
        self.last_loss = means[-1][0]
        for step, (loss, skipped) in zip(steps, means, strict=True):
            self.anomaly = self.anomaly or self.detector.add_step(step, loss, skipped > 0)
        self._record_skipped([step for step, (_, skipped) in zip(steps, means, strict=True) if skipped > 0])
        return self.anomaly

    def _record_skipped(self, steps: list[int]) -> None:
        if steps:
            noun = "step" if len(steps) == 1 else "steps"
            self._log_message(f"Skipped {noun} {', '.join(map(str, steps))}: gradients are not finite.")
            if self._world.is_main:
                with suppress(OSError):  # if the disk is full, the log may still have the message
                    history.append(self._run_dir, "steps_skipped", steps=steps)

    def check_weights(self, are_finite: bool, step: int) -> None:
        """Check that the weights of all processes are finite, before they are saved.

        Args:
            are_finite: Whether the weights of this process are finite.
            step: The number of steps done.

        Raises:
            NonFiniteError: A weight of at least one process is not finite. Raised on all processes.
        """
        if not all(self._world.all_gather(are_finite)):
            last_checkpoint = [None, *list_checkpoints(self._run_dir)][-1]
            raise NonFiniteError(
                f"weights are not finite after step {step}; they are not saved (last checkpoint: {last_checkpoint}). {ADVICE}."
            )

    def roll_back(self, anomaly: Anomaly, step: int) -> Path:
        """Choose the checkpoint to return to, and skip the positions that led to an anomaly.

        The caller loads the checkpoint and calls :meth:`restore` with its state.

        Args:
            anomaly: The result of :meth:`check`.
            step: The number of steps done.

        Raises:
            RollbackError: A rollback is not possible or not allowed. The error names steps and samples.
        """
        checkpoint, event = self._world.run_on_main(lambda: self._decide(anomaly, step))
        self._past.append(event)
        self.num_rollbacks = event["number"]
        self.plan = self.plan.skip(*event["positions"])
        return checkpoint

    def _decide(self, anomaly: Anomaly, step: int) -> tuple[Path, dict[str, Any]]:
        is_allowed = self.num_rollbacks < self._config.max_rollbacks
        checkpoint = self._choose_checkpoint(anomaly.first_step - 1) if is_allowed else None
        # The step before the first bad step may have damaged the weights, so it is skipped as well. It is not skipped if the
        # checkpoint contains it, because then the step was good.
        target_step = get_step(checkpoint) if checkpoint else 0
        first_skipped = max(anomaly.first_step - 1, target_step + 1)
        num_images = (anomaly.last_step - first_skipped + 1) * self.plan.global_batch
        positions = self.plan.positions(first_skipped - 1, 0, 1, 0, num_images)
        samples = [self._index.location(s) for s in self.plan.samples(positions[:RECORDED_SAMPLES]).tolist()]
        cause = f"{anomaly.reason} in steps {anomaly.first_step} to {anomaly.last_step}"
        images = f"{num_images} images from position {positions[0]} ({', '.join(samples[:PRINTED_SAMPLES])}, ...)"
        fields = {
            "reason": anomaly.reason,
            "detected": step,
            "skipped_steps": [first_skipped, anomaly.last_step],
            "positions": [int(positions[0]), int(positions[-1]) + 1],
            "samples": samples,
        }
        if checkpoint is None:
            why = "there is no earlier checkpoint to roll back to"
            if not is_allowed:
                why = f"rollback.max_rollbacks={self._config.max_rollbacks} allows no further rollback"
            with suppress(OSError):  # the error contains most of it
                history.append(self._run_dir, "rollback_failed", **fields)
            raise RollbackError(f"{cause}, and {why}. The cause may be {images}, see {self._run_dir / history.FILE}. {ADVICE}.")
        event = {"number": self.num_rollbacks + 1, "to": target_step, **fields}
        self._rename_later_checkpoints(checkpoint)
        try:
            history.append(self._run_dir, "rollback", **event)
        except OSError as error:
            path = self._run_dir / history.FILE
            raise RollbackError(
                f"{path}: cannot be written ({error.strerror}), so the run cannot roll back after {cause}."
            ) from None
        self._log_message(f"Rollback {event['number']} from step {step} to {checkpoint}: {cause}. The run skips {images}.")
        return checkpoint, event

    def _choose_checkpoint(self, last_step: int) -> Path | None:
        """Return the newest good checkpoint up to a step.

        If the last rollback returned to the same checkpoint and the run has saved none since, the checkpoint itself may be
        the cause. Then return the checkpoint before it, if there is one.
        """
        checkpoint = None
        try:
            checkpoint = find_latest_valid(self._run_dir, self._log_message, rename_damaged=True, max_step=last_step)
            # A rollback renames all later checkpoints. If its target is the newest again, the run has saved none since.
            if checkpoint and self._past and get_step(checkpoint) == self._past[-1]["to"]:
                earlier = find_latest_valid(
                    self._run_dir, self._log_message, rename_damaged=True, max_step=get_step(checkpoint) - 1
                )
                checkpoint = earlier or checkpoint
        except CheckpointError as error:
            self._log_message(str(error))
        return checkpoint

    def _rename_later_checkpoints(self, checkpoint: Path) -> None:
        """Rename all later checkpoints, so that a resumed run does not find them."""
        for later in list_checkpoints(self._run_dir):
            if later.name > checkpoint.name and rename_as_damaged(later) is None:
                raise RollbackError(f"{later}: cannot be renamed, but contains the anomaly. Delete it and start the run again.")


def read_rollbacks(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rollbacks in the history of a run, in order, since its last start at step 0.

    Raises:
        RollbackError: A rollback does not contain the positions that it skipped.
    """
    path, rollbacks = run_dir / history.FILE, list[dict[str, Any]]()
    for event in history.read(run_dir):
        if event["event"] == "start" and not event.get("step"):
            rollbacks.clear()
        elif event["event"] == "rollback":
            if not (_are_integers(event.get("positions"), 2) and _are_integers([event.get("to")], 1)):
                raise RollbackError(f"{path}: a rollback does not contain the positions that it skipped. Restore the file.")
            rollbacks.append(event)
    return rollbacks


def _are_integers(values: Any, count: int) -> bool:
    return isinstance(values, list) and [type(value) for value in values] == [int] * count
