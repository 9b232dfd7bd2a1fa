"""What a run trains: the initial model, the inputs of a micro-batch, and the evaluation during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from scale_mae.config import Config
from scale_mae.data.index import Index
from scale_mae.data.loader import Batch
from scale_mae.distributed.process_group import World
from scale_mae.engine.deepspeed import Engine
from scale_mae.engine.trainable import TrainableModule
from scale_mae.metrics.calculator import Metrics
from scale_mae.weights.initialization import build_initial_model


class Task(Protocol):
    """The interface of a training task. The model computes the loss; see :mod:`scale_mae.model`."""

    @property
    def model(self) -> TrainableModule:
        """The model on the host, the same on all processes."""

    @property
    def num_patches(self) -> int:
        """Number of patches that need mask noise. 0 if the task uses no masks."""

    @property
    def description(self) -> str:
        """The model and the task for the log, such as ``MAE pre-training of ViT-base``."""

    def model_inputs(self, batch: Batch, images_B3HW: Tensor) -> tuple[Tensor, ...]:
        """Return the inputs of the model's forward pass, on the device of the images."""

    def should_evaluate(self, step: int, total_steps: int) -> bool:
        """Return whether to evaluate the model after a step."""

    def evaluate(self, engine: Engine, step: int, report_progress: Callable[[], None]) -> tuple[Metrics, list[str]]:
        """Evaluate the model. Return metrics, and lines for the log. All processes call this.

        Args:
            engine: The engine that trains the model.
            step: The number of steps done.
            report_progress: Called after each batch, so that the watchdog does not end the process.
        """

    def on_checkpoint_saved(self, checkpoint: Path) -> None:
        """Handle the last checkpoint of the run, which may contain the weights of the last evaluation. Rank 0 calls this."""

    def state(self) -> dict[str, Any]:
        """Return entries for the state of a checkpoint."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the task from the state of a checkpoint, which contains the entries of :meth:`state`."""


class PretrainingTask:
    """Pre-training of a masked autoencoder; see :class:`Task`. It has no evaluation."""

    def __init__(self, config: Config, world: World, messages: list[str], *, resumed: bool) -> None:
        self.model = build_initial_model(config, world, messages, resumed=resumed)
        self.num_patches, self.description = self.model.num_patches, f"MAE pre-training of ViT-{config.model.size}"

    def model_inputs(self, batch: Batch, images_B3HW: Tensor) -> tuple[Tensor, ...]:
        """Return the images and the mask noise."""
        assert batch.mask_noise is not None
        return images_B3HW, batch.mask_noise.to(images_B3HW.device, non_blocking=True)

    def should_evaluate(self, step: int, total_steps: int) -> bool:
        """Return False."""
        return False

    def evaluate(self, engine: Engine, step: int, report_progress: Callable[[], None]) -> tuple[Metrics, list[str]]:
        """Return no metrics and no lines."""
        return {}, []

    def on_checkpoint_saved(self, checkpoint: Path) -> None:
        """Do nothing."""

    def state(self) -> dict[str, Any]:
        """Return no entries."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Do nothing."""


def build_task(config: Config, index: Index, world: World, messages: list[str], *, resumed: bool) -> Task:
    """Build the task of a run. All processes call this.

    Args:
        config: The configuration of the run.
        index: The index of the training images.
        world: The process group.
        messages: Messages for the log are appended here.
        resumed: Whether the run resumes from a checkpoint, which will replace the initial weights.

    Raises:
        UserError: The initial weights do not match the model, or the images of a classifier have no labels.
    """
    if config.run.task == "pretrain":
        return PretrainingTask(config, world, messages, resumed=resumed)
    from scale_mae.training.classification import ClassificationTask  # imports timm's augmentations, which takes seconds

    return ClassificationTask(config, index, world, messages, resumed=resumed)
