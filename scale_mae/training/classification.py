"""Fine-tuning and linear probing: class labels, soft targets, and the accuracy on validation images."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scale_mae.checkpoint.paths import get_step
from scale_mae.config import Config, UserError
from scale_mae.data.crop_boxes import reference_crop_pct
from scale_mae.data.image_list import NO_LABEL
from scale_mae.data.index import Index
from scale_mae.data.loader import Batch
from scale_mae.data.mixup import BatchAugmentation
from scale_mae.data.transforms import normalize
from scale_mae.distributed.process_group import World
from scale_mae.engine.deepspeed import Engine
from scale_mae.evaluation.accuracy import Score, score_classifiers
from scale_mae.evaluation.datasets import DatasetPart, list_parts
from scale_mae.evaluation.image_loader import center_crop_transform
from scale_mae.evaluation.results import Result, content_digest, measurement_metadata
from scale_mae.metrics.calculator import Metrics
from scale_mae.weights.classifier_initialization import build_initial_classifier
from scale_mae.weights.metadata import training_settings
from scale_mae.weights.weight_import import read_weights


class ClassificationTask:
    """Training of a classifier; see :class:`scale_mae.training.tasks.Task`.

    Args:
        config: The configuration of the run.
        index: The index of the training images.
        world: The process group.
        messages: Messages for the log are appended here.
        resumed: Whether the run resumes from a checkpoint.

    Raises:
        UserError: Training images have no labels, the validation images are missing or have other classes, or the initial
            weights do not match the model.
    """

    num_patches = 0

    def __init__(self, config: Config, index: Index, world: World, messages: list[str], *, resumed: bool) -> None:
        self._config, self._world = config, world
        self._labels = index.entries["label"]
        self._train_digest = index.digest
        self.classes = world.run_on_main(lambda: _class_names(config.data.source, index))
        self._val = world.run_on_main(lambda: _open_validation_images(config, self.classes))
        self.model, self._initialized_from = build_initial_classifier(
            config, len(self.classes), world, messages, resumed=resumed
        )
        self._batch_augmentation = BatchAugmentation(config.classify, len(self.classes))
        self._best_probe = 0
        self._result_path = Path(config.run.dir) / "results" / f"{config.run.task}.json"
        kind = "linear probing" if config.run.task == "linprobe" else "fine-tuning"
        self.description = f"{kind} of ViT-{config.model.size} with {len(self.classes)} classes"
        self._eval_interval = config.steps(config.classify.eval_interval, len(index))

    def model_inputs(self, batch: Batch, images_B3HW: Tensor) -> tuple[Tensor, ...]:
        """Return the augmented images, and the target probability of each class."""
        labels = torch.from_numpy(self._labels[batch.samples].astype(np.int64))
        if images_B3HW.is_cuda:
            labels = labels.pin_memory()
        if self.model.uses_rng:
            torch.manual_seed(batch.seed)  # for drop path
        return self._batch_augmentation(images_B3HW, labels.to(images_B3HW.device, non_blocking=True), batch.seed)

    def should_evaluate(self, step: int, total_steps: int) -> bool:
        """Return whether ``classify.eval_interval`` has passed or the schedule ends."""
        return self._val is not None and (step == total_steps or step % self._eval_interval == 0)

    def evaluate(self, engine: Engine, step: int, report_progress: Callable[[], None]) -> tuple[Metrics, list[str]]:
        """Measure the accuracy on ``classify.val_source``, and write it to ``results/`` in the run directory."""
        start = time.monotonic()
        self._average_running_statistics()
        probe_scores = self._score(engine, report_progress, ema=False)
        self._best_probe = max(range(len(probe_scores)), key=lambda n: probe_scores[n].top1)
        best_scores = {"": probe_scores[self._best_probe]}  # by prefix of the metrics
        if self._config.optim.ema_decay is not None:
            best_scores["ema_"] = self._score(engine, report_progress, ema=True)[self._best_probe]
        metrics: Metrics = {"val_step": step, "val_images": probe_scores[0].images}
        lines = []
        for prefix, score in best_scores.items():
            metrics |= {f"val_{prefix}{key}": value for key, value in _score_values(score).items()}
            lines.append(
                f"Evaluation at step {step}{', EMA weights' if prefix else ''}: top-1 {score.top1:.2%}, "
                f"top-5 {score.top5:.2%}, loss {score.loss:.4f} on {score.images} images."
            )
        multipliers = self._config.classify.lr_multipliers
        if len(multipliers) > 1:
            each = ", ".join(f"x {m:g}: {score.top1:.2%}" for m, score in zip(multipliers, probe_scores, strict=True))
            lines.append(f"Top-1 by learning rate: {each}. The best is x {multipliers[self._best_probe]:g}.")
        return metrics, [*lines, *self._write_result(probe_scores, best_scores, step, time.monotonic() - start)]

    def on_checkpoint_saved(self, checkpoint: Path) -> None:
        """Add the digest of the weights to the result file, if the checkpoint contains the evaluated weights."""
        with suppress(UserError):
            result = Result.read(self._result_path)
            if result.model["step"] == get_step(checkpoint):
                digest = read_weights(checkpoint).digest()
                replace(result, model=result.model | {"sha256": digest}).write(self._result_path)

    def state(self) -> dict[str, Any]:
        """Return the class names, the number of the best probe, and the source of the initial weights."""
        self._average_running_statistics()
        return {
            "classifier": {"classes": self.classes, "best_probe": self._best_probe, "initialized_from": self._initialized_from},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the number of the best probe and the source of the initial weights."""
        self._best_probe, self._initialized_from = state["classifier"]["best_probe"], state["classifier"]["initialized_from"]

    def _average_running_statistics(self) -> None:
        """Average the running statistics of batch norm over all processes.

        The update of a running statistic is linear, so averaging at any time gives the same final average.
        """
        if statistics := self.model.batch_norm_statistics():
            means = torch.cat(statistics) / self._world.size
            self._world.all_reduce_sum(means)
            for statistic, mean in zip(statistics, torch.split(means, [len(t) for t in statistics]), strict=True):
                statistic.copy_(mean)

    def _score(self, engine: Engine, report_progress: Callable[[], None], *, ema: bool) -> list[Score]:
        """Return the score of each probe, or of the one classifier."""
        config, val = self._config, self._val
        assert val is not None
        side, device = config.model.image_size[0], self._world.device
        with engine.evaluation_mode(ema=ema):

            def logits(images_BHW3: Tensor) -> Tensor:
                images = normalize(images_BHW3.to(device), config.data.mean, config.data.std)
                outputs: Tensor = engine.model(images).logits
                return outputs if outputs.dim() == 3 else outputs[None]

            view, batch = (
                center_crop_transform(side, config.classify.crop_pct or reference_crop_pct(side)),
                config.train.micro_batch,
            )
            return score_classifiers(logits, val, view, self._world, batch, lambda done, total: report_progress())

    def _write_result(self, probe_scores: list[Score], best_scores: dict[str, Score], step: int, seconds: float) -> list[str]:
        """Write the result file of an evaluation. Return an error message if it cannot be written; training continues."""
        config = self._config
        classify, side = config.classify, config.model.image_size[0]
        training: dict[str, Any] = training_settings(config.model_dump(mode="json"))
        del training["data"]["source"]  # a path; the digest of the images identifies them
        training |= {"trained_on": self._train_digest, "initialized_from": self._initialized_from}
        values = {f"{prefix}{key}": v for prefix, score in best_scores.items() for key, v in _score_values(score).items()}
        result = Result(
            protocol={
                "name": config.run.task,
                "set": classify.val_source,
                "size": side,
                "crop_pct": classify.crop_pct or reference_crop_pct(side),
                **training,
            },
            model={
                "path": config.run.dir,
                "kind": f"scale-mae run, step {step}",
                "architecture": f"ViT-{config.model.size}/{config.model.patch[0]}, {side} px",
                "classes": len(self.classes),
                "sha256": "",  # unknown until the weights are saved
                "step": step,
                "seed": config.run.seed,
                "initialized_from": config.model.init_from,
            },
            data={
                "root": classify.val_source,
                "images": probe_scores[0].images,
                "digest": content_digest([probe_scores[0].content]),
            },
            scores=values,
            parts={
                f"lr x {multiplier:g}": _score_values(score)
                for multiplier, score in zip(classify.lr_multipliers, probe_scores, strict=True)
            },
            environment=measurement_metadata(self._world.size, self._world.device.type, seconds),
        )
        return self._world.run_on_main(lambda: _try_to_write(result, self._result_path))


def _try_to_write(result: Result, path: Path) -> list[str]:
    """Write a result, or return the error."""
    try:
        result.write(path)
    except UserError as error:
        return [str(error)]
    return []


def _score_values(score: Score) -> dict[str, float]:
    return {"top1": score.top1, "top5": score.top5, "loss": score.loss}


def _class_names(source: str, index: Index) -> list[str]:
    """Return the class names of the training images, or the class numbers as strings if the index has no names."""
    labels = index.entries["label"]
    if missing := int((labels == NO_LABEL).sum()):
        raise UserError(
            f"data.source={source}: {missing} of {len(index)} images have no label. A classifier needs a labeled source, such "
            "as class folders."
        )
    classes = list(index.classes) or [str(number) for number in range(int(labels.max()) + 1)]
    if len(classes) < 2:
        raise UserError(f"data.source={source}: all images belong to one class. Check whether it is the right folder.")
    return classes


def _open_validation_images(config: Config, classes: list[str]) -> DatasetPart | None:
    """Open the validation images and check their classes, so that an error appears before training."""
    source, size = config.classify.val_source, config.model.image_size
    if source is None:
        return None
    if size[0] != size[1]:
        raise UserError(
            f"model.image_size={list(size)}: the evaluation needs square images. Set classify.val_source=null or a square size."
        )
    try:
        (part,) = list_parts("folder", source, classes, len(classes))
    except UserError as error:
        raise UserError(f"classify.val_source={error}") from None
    if unknown := [name for name in part.index.classes if name not in classes and not all(map(str.isdigit, classes))]:
        raise UserError(
            f"classify.val_source={source}: {unknown[0]} is not a class of data.source (such as {classes[0]}). Use images of "
            "the same classes."
        )
    return part
