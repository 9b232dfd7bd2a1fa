"""TensorBoard, Weights & Biases and MLflow, for those who ask for them (``log.trackers``).

Each works in a thread of its own, beginning with the import of its package: a server that is slow or cannot be reached holds up
no step. A run that is started again goes on in the same place.
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scale_mae.config import Config, UserError
from scale_mae.metrics.calculator import Metrics
from scale_mae.metrics.sinks import Sink

BEHIND = 10_000  # log lines that may wait
PATIENCE = 20.0  # seconds that the end of a run waits for a tracker; a job may be about to be killed


def check_packages(names: Sequence[str]) -> None:
    """Whether what ``log.trackers`` asks for is installed.

    Raises:
        UserError: it is not.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"log.trackers={name} needs a package that is missing; pip install 'scale-mae[sinks]', or leave it out"
            )


def build_trackers(config: Config, run_id: str, first_step: int) -> list[Tracker]:
    """The trackers that ``log.trackers`` asks for.

    Args:
        config: told to each.
        run_id: name of the run, the same over restarts.
        first_step: where this process group begins.
    """
    return [TRACKERS[name](config, run_id, first_step) for name in config.log.trackers]


class Tracker(Sink, ABC):
    """A sink in a thread of its own, for metrics only. What goes wrong there is raised at the next call."""

    def __init__(self, config: Config, run_id: str, first_step: int) -> None:
        self.config, self.run_id, self.first_step = config, run_id, first_step
        self.folder = Path(config.run.dir)
        self._lines: queue.Queue[Metrics | None] = queue.Queue(BEHIND)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name=f"tracker of {type(self).__name__}", daemon=True)
        self._thread.start()

    @abstractmethod
    def open(self) -> None:
        """Begin, or go on."""

    def go_back(self, step: int) -> None:
        """``step`` and maybe later ones were told before and are done again. For who can take them back."""

    @abstractmethod
    def write(self, step: int, seconds: float, values: dict[str, float]) -> None:
        """Take the values of a log step, made at a time in seconds since 1970."""

    @abstractmethod
    def finish(self, *, finished: bool) -> None:
        """No more will come; ``finished``: the schedule is done."""

    def write_metrics(self, metrics: Metrics) -> None:
        """Hand over the metrics of one log step."""
        self._check()
        self._lines.put_nowait(metrics)

    def close(self, *, failed: bool = False) -> None:
        """Wait a while until all is there."""
        self._check()
        self._lines.put_nowait(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            raise TimeoutError(f"not done after {PATIENCE:g} s")
        self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            self.open()
            step, total = 0, 1
            while (metrics := self._lines.get()) is not None:
                before, step, total = step, int(metrics["step"] or 0), int(metrics["total_steps"] or 0)
                if step <= before:  # all that was told of steps after the checkpoint was told of this step or later ones
                    self.go_back(step)
                values = {key: value for key, value in metrics.items() if value is not None and key not in ("step", "time")}
                self.write(step, metrics["time"] or time.time(), values)
            self.finish(finished=step >= total)
        except Exception as error:
            self._error = error


class TensorBoard(Tracker):
    """Event files in ``tensorboard`` in the run directory."""

    def open(self) -> None:
        """Begin a file. Steps that a crash took back are hidden by it."""
        self._begin(self.first_step + 1)
        self._writer.add_text("config", f"```\n{self.config.to_yaml()}```", self.first_step)

    def go_back(self, step: int) -> None:
        """Begin another file, for the same reason."""
        self._writer.close()
        self._begin(step)

    def _begin(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step)

    def write(self, step: int, seconds: float, values: dict[str, float]) -> None:
        """Scalars by the names of ``log.jsonl``."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step, seconds)

    def finish(self, *, finished: bool) -> None:
        """Write what is held back."""
        self._writer.close()


class Wandb(Tracker):
    """A run of Weights & Biases with our run's name; ``WANDB_MODE``, ``WANDB_PROJECT`` and the like are respected."""

    def open(self) -> None:
        """Begin, or go on."""
        import wandb

        self._run: Any = wandb.init(
            id=self.run_id,
            name=self.run_id,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", "scale-mae"),
            dir=os.environ.get("WANDB_DIR", str(self.folder)),
            config=self.config.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="step")  # its own count of steps cannot go back, a run can

    def write(self, step: int, seconds: float, values: dict[str, float]) -> None:
        """Values by the names of ``log.jsonl``."""
        self._run.log({"step": step, **values})

    def finish(self, *, finished: bool) -> None:
        """Send what is held back."""
        self._run.finish()


class Mlflow(Tracker):
    """A run of MLflow, found again by its tag; ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME`` are respected.

    Without an address it goes to ``mlflow`` in the run directory.
    """

    TAG = "scale_mae.run_id"

    def open(self) -> None:
        """Begin, or go on."""
        from mlflow.tracking import MlflowClient

        address = os.environ.get("MLFLOW_TRACKING_URI")
        if not address:
            address = (self.folder.resolve() / "mlflow").as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny brings no database to prefer to files
        self._client: Any = MlflowClient(tracking_uri=address)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "scale-mae")
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        runs = self._client.search_runs([experiment], filter_string=f"tags.`{self.TAG}` = '{self.run_id}'", max_results=1)
        if runs:
            self._id = runs[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(experiment, tags={self.TAG: self.run_id}, run_name=self.run_id).info.run_id
        for key, value in _flat(self.config.model_dump(mode="json")):
            self._client.log_param(self._id, key, value)

    def write(self, step: int, seconds: float, values: dict[str, float]) -> None:
        """Metrics by the names of ``log.jsonl``."""
        from mlflow.entities import Metric

        when = round(seconds * 1000)
        self._client.log_batch(
            self._id, metrics=[Metric(k, float(v), when, step) for k, v in values.items() if math.isfinite(v)]
        )

    def finish(self, *, finished: bool) -> None:
        """Say how it ended."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


TRACKERS: dict[str, Callable[[Config, str, int], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}


def _flat(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, fields in tree.items():
        for key, value in fields.items():
            yield f"{section}.{key}", value
