"""Fine-tuning and linear probes: labels, mixed targets, and the accuracy on images that are not trained on."""

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

from scale_mae.checkpoint.paths import step_of
from scale_mae.config import Config, UserError
from scale_mae.data.crop_boxes import reference_crop_pct
from scale_mae.data.image_list import NO_LABEL
from scale_mae.data.index import Index
from scale_mae.data.loader import Batch
from scale_mae.data.mixup import BatchAugmentation
from scale_mae.data.transforms import normalize
from scale_mae.distributed.process_group import World
from scale_mae.engine.deepspeed import Engine
from scale_mae.evaluation.accuracy import Score, scores
from scale_mae.evaluation.datasets import Part, parts_of
from scale_mae.evaluation.image_loader import central_view
from scale_mae.evaluation.results import Result, content_digest, made_by
from scale_mae.metrics.calculator import Metrics
from scale_mae.weights.classifier_initialization import build_initial_classifier
from scale_mae.weights.metadata import training_settings
from scale_mae.weights.weight_import import read_weights


class ClassificationTask:
    """A classifier; see :class:`scale_mae.training.tasks.Task`.

    Raises:
        UserError: images without labels, a set to evaluate on that is missing or has other classes, or weights that do not
            fit.
    """

    num_patches = 0

    def __init__(self, config: Config, index: Index, world: World, notes: list[str], *, resumed: bool) -> None:
        self._config, self._world = config, world
        self._labels = index.entries["label"]
        self.classes = world.run_on_main(lambda: _classes(config.data.source, index))
        self._train_digest = index.digest
        self._val = world.run_on_main(lambda: _validation(config, self.classes))
        self.model, self._began = build_initial_classifier(config, len(self.classes), world, notes, resumed=resumed)
        self._mixing = BatchAugmentation(config.classify, len(self.classes))
        self._best = 0  # of the probes
        self._results = Path(config.run.dir) / "results" / f"{config.run.task}.json"
        self.what = f"{config.model.size} that tells {len(self.classes)} classes apart"
        self._every = config.steps(config.classify.eval_interval, len(index))

    def inputs(self, batch: Batch, images_B3HW: Tensor) -> tuple[Tensor, ...]:
        """Images and the probability of each class, erased and mixed as asked for."""
        labels = torch.from_numpy(self._labels[batch.samples].astype(np.int64))
        if images_B3HW.is_cuda:
            labels = labels.pin_memory()
        if self.model.uses_rng:
            torch.manual_seed(batch.seed)  # of drop path
        return self._mixing(images_B3HW, labels.to(images_B3HW.device, non_blocking=True), batch.seed)

    def due(self, step: int, total: int) -> bool:
        """Every ``classify.eval_interval``, and at the end."""
        return self._val is not None and (step == total or step % self._every == 0)

    def judge(self, engine: Engine, step: int, beat: Callable[[], None]) -> tuple[Metrics, list[str]]:
        """Accuracy on ``classify.val_source``; written to ``results/`` in the run directory too."""
        began = time.monotonic()
        self._settle()
        found = self._score(engine, beat, ema=False)
        self._best = max(range(len(found)), key=lambda n: found[n].top1)
        told = {"": found[self._best]}
        if self._config.optim.ema_decay is not None:
            told["ema_"] = self._score(engine, beat, ema=True)[self._best]
        metrics: Metrics = {"val_step": step, "val_images": found[0].images}
        lines = []
        for kind, each in told.items():
            metrics |= {f"val_{kind}{key}": value for key, value in _plain(each).items()}
            of = " of the moving average" if kind else ""
            lines.append(
                f"step {step}: top-1{of} {each.top1:.2%}, top-5 {each.top5:.2%}, loss {each.loss:.4f}, {each.images} images"
            )
        rates = self._config.classify.lr_multipliers
        if len(rates) > 1:
            each_rate = ", ".join(f"x {rate:g}: {score.top1:.2%}" for rate, score in zip(rates, found, strict=True))
            lines.append(f"top-1 by learning rate, best x {rates[self._best]:g}: {each_rate}")
        return metrics, [*lines, *self._write(found, told, step, time.monotonic() - began)]

    def saved(self, checkpoint: Path) -> None:
        """The result file tells the digest of the weights, once they are in a checkpoint."""
        with suppress(UserError):
            result = Result.read(self._results)
            if result.model["step"] == step_of(checkpoint):
                replace(result, model=result.model | {"sha256": read_weights(checkpoint).digest()}).write(self._results)

    def state(self) -> dict[str, Any]:
        """Names of the classes, which probe was the best, and what the run began with."""
        self._settle()
        return {"classifier": {"classes": self.classes, "best_probe": self._best, "initialized_from": self._began}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See :class:`scale_mae.training.tasks.Task`."""
        self._best, self._began = state["classifier"]["best_probe"], state["classifier"]["initialized_from"]

    def _settle(self) -> None:
        """Running means of what each process has seen become those of all. Training does not feel it: updates are linear."""
        if own := self.model.batch_norm_statistics():
            mean = torch.cat(own) / self._world.size
            self._world.all_reduce_sum(mean)
            for statistic, value in zip(own, torch.split(mean, [len(t) for t in own]), strict=True):
                statistic.copy_(value)

    def _score(self, engine: Engine, beat: Callable[[], None], *, ema: bool) -> list[Score]:
        config, val = self._config, self._val
        assert val is not None
        side, device = config.model.image_size[0], self._world.device
        with engine.evaluation_mode(ema=ema):

            def logits(images_BHW3: Tensor) -> Tensor:
                images = normalize(images_BHW3.to(device), config.data.mean, config.data.std)
                outputs: Tensor = engine.model(images).logits
                return outputs if outputs.dim() == 3 else outputs[None]

            view, batch = central_view(side, config.classify.crop_pct or reference_crop_pct(side)), config.train.micro_batch
            return scores(logits, val, view, self._world, batch, lambda done, total: beat())

    def _write(self, found: list[Score], told: dict[str, Score], step: int, seconds: float) -> list[str]:
        """The result file of the newest evaluation; what there is to tell of it."""
        config = self._config
        c, side = config.classify, config.model.image_size[0]
        trained: dict[str, Any] = training_settings(config.model_dump(mode="json"))
        del trained["data"]["source"]  # a path; its images have a digest
        trained |= {"trained_on": self._train_digest, "initialized_from": self._began}
        named = {f"{kind}{key}": value for kind, each in told.items() for key, value in _plain(each).items()}
        result = Result(
            {
                "name": config.run.task,
                "set": c.val_source,
                "size": side,
                "crop_pct": c.crop_pct or reference_crop_pct(side),
                **trained,
            },
            {
                "path": config.run.dir,
                "kind": f"scale-mae run, step {step}",
                "architecture": f"ViT-{config.model.size}/{config.model.patch[0]}, {side} px",
                "classes": len(self.classes),
                "sha256": "",  # not known before they are saved
                "step": step,
                "seed": config.run.seed,
                "initialized_from": config.model.init_from,
            },
            {"root": c.val_source, "images": found[0].images, "digest": content_digest([found[0].content])},
            named,
            {f"lr x {rate:g}": _plain(each) for rate, each in zip(c.lr_multipliers, found, strict=True)},
            made_by(self._world.size, self._world.device.type, seconds),
        )
        return self._world.run_on_main(lambda: _written(result, self._results))


def _written(result: Result, path: Path) -> list[str]:
    """A file that cannot be written stops no training."""
    try:
        result.write(path)
    except UserError as error:
        return [str(error)]
    return []


def _plain(each: Score) -> dict[str, float]:
    return {"top1": each.top1, "top5": each.top5, "loss": each.loss}


def _classes(source: str, index: Index) -> list[str]:
    """Names of the classes of the images, or their numbers as texts. One process looks through the labels for all."""
    labels = index.entries["label"]
    if missing := int((labels == NO_LABEL).sum()):
        raise UserError(f"data.source={source}: {missing} of {len(index)} images have no label")
    classes = list(index.classes) or [str(number) for number in range(int(labels.max()) + 1)]
    if len(classes) < 2:
        raise UserError(f"data.source={source}: all images are of one class; is it a folder too high or too low?")
    return classes


def _validation(config: Config, classes: list[str]) -> Part | None:
    """The images to evaluate on, looked at before training, so that what is missing is not found out after it."""
    source, size = config.classify.val_source, config.model.image_size
    if source is None:
        return None
    if size[0] != size[1]:
        raise UserError(f"model.image_size={list(size)}: evaluation takes squares; leave classify.val_source out")
    try:
        (part,) = parts_of("folder", source, classes, len(classes))
    except UserError as error:
        raise UserError(f"classify.val_source={error}") from None
    if strange := [name for name in part.index.classes if name not in classes and not all(map(str.isdigit, classes))]:
        raise UserError(f"classify.val_source={source}: {strange[0]} is no class of data.source (such as {classes[0]})")
    return part
