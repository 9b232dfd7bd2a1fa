"""A run that has gone bad goes back to its last good checkpoint and leaves out the images that led there.

What it left out is a line of ``history.jsonl`` that is on the disk before the run goes on, so that a run resumed later,
from any checkpoint, leaves out the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_mae.checkpoint.discovery import latest_valid, rename_as_damaged
from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.checkpoint.paths import list_checkpoints, step_of
from scale_mae.config import UserError
from scale_mae.config.sections import RollbackConfig
from scale_mae.data.index import Index
from scale_mae.data.sample_plan import SamplePlan
from scale_mae.distributed.process_group import World
from scale_mae.runs import history
from scale_mae.training.anomaly_detector import Anomaly, AnomalyDetector

ADVICE = "lower optim.base_lr, set optim.clip_grad_norm, or use train.precision=bf16"
RECORDED, NAMED = 20, 3  # samples in the history, and in a message


class RollbackError(UserError):
    """A run has gone bad and has nothing left to go back to, or went back too often."""


class RollbackController:
    """Watches the steps, and decides where a run goes back to. All processes call the same methods at the same steps.

    Args:
        run_dir: the run directory.
        config: what is bad, and how often a run may go back.
        world: the processes.
        plan: of samples, nothing left out.
        index: names the samples.
        say: told of steps that were left out.
        resumed: from a checkpoint. Without one, what an earlier life of the directory went through does not count.

    Attributes:
        plan: of samples, without what the run leaves out.
        health: of the run, up to the last step that :meth:`judge` saw.
        rollbacks: times that the run has gone back.
        loss: of the last step that :meth:`judge` saw.
        verdict: of :meth:`judge`; stays until the run has gone back.
    """

    def __init__(
        self,
        run_dir: Path,
        config: RollbackConfig,
        world: World,
        plan: SamplePlan,
        index: Index,
        say: Callable[[str], None],
        *,
        resumed: bool,
    ) -> None:
        self.plan, self.health, self.loss = plan, AnomalyDetector(config), float("nan")
        self.verdict: Anomaly | None = None
        self._say = say
        self._dir, self._config, self._world, self._index = run_dir, config, world, index
        self._steps: list[int] = []
        self._seen: list[Tensor] = []
        self._past: list[dict[str, Any]] = world.run_on_main(lambda: _past(run_dir)) if resumed else []
        self.rollbacks = len(self._past)
        for event in self._past:
            self.plan = self.plan.skip(*event["positions"])

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"health": self.health.state(), "skips": [list(s) for s in self.plan.skipped], "rollbacks": self.rollbacks}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint's :meth:`state`; None: it is of a version that had none."""
        state = state or {"health": None, "skips": [], "rollbacks": 0}
        self.health, self.verdict = AnomalyDetector(self._config, state["health"]), None
        self.rollbacks = max(self.rollbacks, state["rollbacks"])  # should somebody have deleted the history
        for first, stop in state["skips"]:
            self.plan = self.plan.skip(first, stop)

    def add(self, step: int, loss: Tensor, skipped: Tensor) -> None:
        """Remember a step on the device.

        Args:
            step: counted from 1.
            loss: this process's, a scalar.
            skipped: 1 when it was left out, else 0; a scalar, the same on every process.
        """
        self._steps.append(step)
        self._seen.append(torch.stack([loss, skipped]))

    def judge(self) -> Anomaly | None:
        """The verdict on the run, after a look at the steps since the last call; that waits for the accelerator."""
        steps, seen = self._steps, self._seen
        self._steps, self._seen = [], []
        if not steps:
            return self.verdict
        # added up in fp64, so that the result does not depend on the order, which depends on how many are added at once
        sums = torch.stack(seen).double().flatten()
        means = (torch.tensor(self._world.all_reduce_sum(sums)).view(-1, 2) / self._world.size).float().tolist()
        self.loss = means[-1][0]
        for step, (loss, skipped) in zip(steps, means, strict=True):
            self.verdict = self.verdict or self.health.add(step, loss, skipped > 0)
        self._tell([step for step, (loss, skipped) in zip(steps, means, strict=True) if skipped > 0])
        return self.verdict

    def _tell(self, skipped: list[int]) -> None:
        if skipped:
            self._say(f"left out, as gradients were not finite: step {', '.join(map(str, skipped))}")
            if self._world.is_main:
                with suppress(OSError):  # a full disk; the line in the log may still be there
                    history.append(self._dir, "steps_skipped", steps=skipped)

    def go_back(self, verdict: Anomaly, step: int, notes: list[str]) -> Path:
        """Leave out what led to a verdict; the checkpoint to go on from, which is to be loaded and its state restored.

        Args:
            verdict: of :meth:`judge`.
            step: where the run stands.
            notes: told, on the first process, what was decided.

        Raises:
            RollbackError: it may not, or cannot; names steps and samples.
        """
        checkpoint, event = self._world.run_on_main(lambda: self._decide(verdict, step, notes))
        self._past.append(event)
        self.rollbacks = event["number"]
        self.plan = self.plan.skip(*event["positions"])
        return checkpoint

    def _decide(self, verdict: Anomaly, step: int, notes: list[str]) -> tuple[Path, dict[str, Any]]:
        allowed = self.rollbacks < self._config.max_rollbacks
        checkpoint = self._choose(verdict.first - 1, notes) if allowed else None
        # The step before the first bad one may have spoilt the weights; if the checkpoint holds it, it was found good.
        to = step_of(checkpoint) if checkpoint else 0
        first = max(verdict.first - 1, to + 1)
        rows = (verdict.last - first + 1) * self.plan.global_batch
        positions = self.plan.positions(first - 1, 0, 1, 0, rows)
        samples = [self._index.location(s) for s in self.plan.samples(positions[:RECORDED]).tolist()]
        what = (
            f"{verdict.reason} in steps {verdict.first} to {verdict.last}; "
            f"{rows} images from position {positions[0]} on lead there ({', '.join(samples[:NAMED])}, ...)"
        )
        facts = {
            "reason": verdict.reason,
            "detected": step,
            "skipped_steps": [first, verdict.last],
            "positions": [int(positions[0]), int(positions[-1]) + 1],
            "samples": samples,
        }
        if checkpoint is None:
            why = "there is no checkpoint before them to go back to"
            if not allowed:
                why = f"the run went back {self.rollbacks} times before, as often as rollback.max_rollbacks allows"
            with suppress(OSError):  # the error says the most of it
                history.append(self._dir, "rollback_failed", **facts)
            raise RollbackError(f"{what}; {why}; {self._dir / history.FILE} tells of all; {ADVICE}")
        event = {"number": self.rollbacks + 1, "to": to, **facts}
        self._discard_after(checkpoint)
        try:
            history.append(self._dir, "rollback", **event)
        except OSError as error:
            raise RollbackError(f"{self._dir / history.FILE}: cannot be written ({error.strerror}); {what}") from None
        notes.append(f"{what}; goes back from step {step} to {checkpoint} and leaves them out, rollback {event['number']}")
        return checkpoint, event

    def _choose(self, last: int, notes: list[str]) -> Path | None:
        """The newest good checkpoint that is no later than a step. Where the run went back to that one already and has saved
        none since, what is wrong may be in it: then the one before it, if there is one."""
        checkpoint = None
        try:
            checkpoint = latest_valid(self._dir, notes.append, rename_damaged=True, max_step=last)
            if checkpoint and self._past and step_of(checkpoint) == self._past[-1]["to"]:  # later ones were set aside
                older = latest_valid(self._dir, notes.append, rename_damaged=True, max_step=step_of(checkpoint) - 1)
                checkpoint = older or checkpoint
        except CheckpointError as error:
            notes.append(str(error))
        return checkpoint

    def _discard_after(self, checkpoint: Path) -> None:
        """A run that is resumed must not find what this one turns its back on."""
        for newer in list_checkpoints(self._dir):
            if newer.name > checkpoint.name and rename_as_damaged(newer) is None:
                raise RollbackError(f"{newer}: is of a run gone bad and cannot be renamed; delete it and start again")


def _past(run_dir: Path) -> list[dict[str, Any]]:
    """Rollbacks of the run that a directory holds, in order; not of one that was begun anew since."""
    path, found = run_dir / history.FILE, list[dict[str, Any]]()
    for event in history.read(run_dir):
        if event["event"] == "start" and not event.get("step"):
            found.clear()
        elif event["event"] == "rollback":
            if not (_are_numbers(event.get("positions"), 2) and _are_numbers([event.get("to")], 1)):
                raise RollbackError(f"{path}: a rollback does not tell what it left out; bring the file back as it was")
            found.append(event)
    return found


def _are_numbers(values: Any, count: int) -> bool:
    return isinstance(values, list) and [type(value) for value in values] == [int] * count
