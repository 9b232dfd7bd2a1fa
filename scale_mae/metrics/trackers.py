"""Experiment trackers: TensorBoard, Weights & Biases and MLflow. ``log.trackers`` selects them.

Each tracker works in its own thread, including the import of its package. A slow or unreachable server does not delay training.
A resumed run continues in the same place of the tracker.
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

MAX_QUEUED = 10_000  # log lines that may wait for a slow tracker
CLOSE_TIMEOUT = 20.0  # seconds that the end of a run waits for a tracker; Slurm may be about to kill the job


def check_packages(names: Sequence[str]) -> None:
    """Check that the packages of the trackers are installed.

    Args:
        names: Names of trackers, as in ``log.trackers``.

    Raises:
        UserError: A package is missing.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"log.trackers={name}: the package {name} is not installed. "
                f"Run pip install 'scale-mae[trackers]', or remove {name} from log.trackers."
            )


def build_trackers(config: Config, run_id: str, first_step: int) -> list[Tracker]:
    """Return the trackers that ``log.trackers`` lists.

    Args:
        config: Configuration of the run. The trackers store it.
        run_id: ID of the run, which stays the same across restarts.
        first_step: Step from which this process starts or resumes.
    """
    return [TRACKERS[name](config, run_id, first_step) for name in config.log.trackers]


class Tracker(Sink, ABC):
    """A sink for metrics that works in its own thread. The next call raises an error of the thread.

    A subclass implements :meth:`open`, :meth:`write` and :meth:`finish`, which run in the thread.
    """

    def __init__(self, config: Config, run_id: str, first_step: int) -> None:
        self.config, self.run_id, self.first_step = config, run_id, first_step
        self.run_dir = Path(config.run.dir)
        self._queue: queue.Queue[Metrics | None] = queue.Queue(MAX_QUEUED)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name=f"tracker {type(self).__name__}", daemon=True)
        self._thread.start()

    @abstractmethod
    def open(self) -> None:
        """Create the run in the tracker, or continue it."""

    def rewind(self, step: int) -> None:
        """Discard the values from ``step`` on, because the run repeats it. The default keeps them."""

    @abstractmethod
    def write(self, step: int, timestamp: float, values: dict[str, float]) -> None:
        """Write the values of a log step. ``timestamp`` is in seconds since 1970."""

    @abstractmethod
    def finish(self, *, finished: bool) -> None:
        """Close the run in the tracker. ``finished`` states whether the schedule is complete."""

    def write_message(self, message: str) -> None:
        """Ignore messages."""

    def write_metrics(self, metrics: Metrics) -> None:
        """Queue the metrics of one log step."""
        self._raise_error()
        self._queue.put_nowait(metrics)

    def close(self, *, failed: bool = False) -> None:
        """Wait until the tracker has received everything, for :data:`CLOSE_TIMEOUT` seconds at most."""
        self._raise_error()
        self._queue.put_nowait(None)
        self._thread.join(CLOSE_TIMEOUT)
        if self._thread.is_alive():
            raise TimeoutError(f"not finished after {CLOSE_TIMEOUT:g} s")
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            self.open()
            step, total = 0, 1
            while (metrics := self._queue.get()) is not None:
                previous, step, total = step, int(metrics["step"] or 0), int(metrics["total_steps"] or 0)
                if step <= previous:  # after a rollback; earlier lines after its checkpoint are of this step or later
                    self.rewind(step)
                values = {key: value for key, value in metrics.items() if value is not None and key not in ("step", "time")}
                self.write(step, metrics["time"] or time.time(), values)
            self.finish(finished=step >= total)
        except Exception as error:
            self._error = error


class TensorBoard(Tracker):
    """Writes event files to the folder ``tensorboard`` in the run directory."""

    def open(self) -> None:
        """Open an event file. It hides the steps that a crash reverted."""
        self._open_file(self.first_step + 1)
        self._writer.add_text("config", f"```\n{self.config.to_yaml()}```", self.first_step)

    def rewind(self, step: int) -> None:
        """Open another event file, which hides the steps from ``step`` on in the earlier ones."""
        self._writer.close()
        self._open_file(step)

    def _open_file(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=step)

    def write(self, step: int, timestamp: float, values: dict[str, float]) -> None:
        """Write scalars under the keys of ``log.jsonl``."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step, timestamp)

    def finish(self, *, finished: bool) -> None:
        """Close the event file."""
        self._writer.close()


class Wandb(Tracker):
    """Logs to a Weights & Biases run with the ID of our run. It respects ``WANDB_MODE``, ``WANDB_PROJECT`` and the like."""

    def open(self) -> None:
        """Create the run, or continue it."""
        import wandb

        self._run: Any = wandb.init(
            id=self.run_id,
            name=self.run_id,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", "scale-mae"),
            dir=os.environ.get("WANDB_DIR", str(self.run_dir)),
            config=self.config.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="step")  # the step counter of W&B cannot decrease, but a run can roll back

    def write(self, step: int, timestamp: float, values: dict[str, float]) -> None:
        """Log values under the keys of ``log.jsonl``."""
        self._run.log({"step": step, **values})

    def finish(self, *, finished: bool) -> None:
        """Send the remaining values."""
        self._run.finish()


class Mlflow(Tracker):
    """Logs to an MLflow run, which a tag identifies. It respects ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME``.

    Without a tracking URI it writes to the folder ``mlflow`` in the run directory.
    """

    TAG = "scale_mae.run_id"

    def open(self) -> None:
        """Create the run, or continue it."""
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (self.run_dir.resolve() / "mlflow").as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny does not contain a database backend
        self._client: Any = MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "scale-mae")
        existing = self._client.get_experiment_by_name(name)
        experiment = existing.experiment_id if existing else self._client.create_experiment(name)
        runs = self._client.search_runs([experiment], filter_string=f"tags.`{self.TAG}` = '{self.run_id}'", max_results=1)
        if runs:
            self._id = runs[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(experiment, tags={self.TAG: self.run_id}, run_name=self.run_id).info.run_id
        for key, value in _flatten(self.config.model_dump(mode="json")):
            self._client.log_param(self._id, key, value)

    def write(self, step: int, timestamp: float, values: dict[str, float]) -> None:
        """Log metrics under the keys of ``log.jsonl``."""
        from mlflow.entities import Metric

        milliseconds = round(timestamp * 1000)
        metrics = [Metric(key, float(value), milliseconds, step) for key, value in values.items() if math.isfinite(value)]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self, *, finished: bool) -> None:
        """Set the final status of the run."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


TRACKERS: dict[str, Callable[[Config, str, int], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}


def _flatten(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, fields in tree.items():
        for key, value in fields.items():
            yield f"{section}.{key}", value
