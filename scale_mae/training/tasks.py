"""What a run trains: the model it begins with, what one micro-batch gives it, and how it is judged on the way."""

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
    """See this module's text."""

    @property
    def model(self) -> TrainableModule:
        """On the host, the same on every process."""

    @property
    def num_patches(self) -> int:
        """That mask noise is wanted for; 0: none."""

    @property
    def what(self) -> str:
        """The model and its task in words."""

    def inputs(self, batch: Batch, images_B3HW: Tensor) -> tuple[Tensor, ...]:
        """What the model's forward pass takes, on the device of the images."""

    def due(self, step: int, total: int) -> bool:
        """Whether it is to be judged after a step."""

    def judge(self, engine: Engine, step: int, beat: Callable[[], None]) -> tuple[Metrics, list[str]]:
        """How good the model is: metrics, and lines for people. All processes call it.

        Args:
            engine: trains it.
            step: steps done.
            beat: called now and then, so that nobody thinks the run hangs.
        """

    def saved(self, checkpoint: Path) -> None:
        """The weights that were judged last may be in a checkpoint now. The first process calls it."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to tell of the model besides."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of a checkpoint, which :meth:`state` is part of."""


class PretrainingTask:
    """A masked autoencoder; see :class:`Task`. Its loss is all there is to judge it by."""

    def __init__(self, config: Config, world: World, notes: list[str], *, resumed: bool) -> None:
        self.model = build_initial_model(config, world, notes, resumed=resumed)
        self.num_patches, self.what = self.model.num_patches, config.model.size

    def inputs(self, batch: Batch, images_B3HW: Tensor) -> tuple[Tensor, ...]:
        """Images, and the noise that decides on the masks."""
        assert batch.mask_noise is not None
        return images_B3HW, batch.mask_noise.to(images_B3HW.device, non_blocking=True)

    def due(self, step: int, total: int) -> bool:
        """Never."""
        return False

    def judge(self, engine: Engine, step: int, beat: Callable[[], None]) -> tuple[Metrics, list[str]]:
        """Nothing to say."""
        return {}, []

    def saved(self, checkpoint: Path) -> None:
        """Nothing to tell of them."""

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


def build_task(config: Config, index: Index, world: World, notes: list[str], *, resumed: bool) -> Task:
    """The task of a run; what is to be told of its beginning is appended to ``notes``. All processes call it.

    Raises:
        UserError: weights to begin with that do not fit, or images without labels.
    """
    if config.run.task == "pretrain":
        return PretrainingTask(config, world, notes, resumed=resumed)
    from scale_mae.training.classification import ClassificationTask  # which brings timm's augmentations, seconds to import

    return ClassificationTask(config, index, world, notes, resumed=resumed)
