"""Accuracy of classifiers on a data set. It is exact for any number of processes: one process scores each image, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from scale_mae.config import UserError
from scale_mae.data.transforms import normalize
from scale_mae.distributed.process_group import World
from scale_mae.evaluation.datasets import DatasetPart
from scale_mae.evaluation.image_loader import CONTENT_BITS, ImageTransform, load_images
from scale_mae.evaluation.models import EvaluatedModel


@dataclass(frozen=True)
class Score:
    """The scores of a classifier on some images.

    Attributes:
        images: The number of images.
        top1: The share of images whose class has the largest output.
        top5: The share of images whose class has one of the five largest outputs.
        loss: The mean cross entropy in nats.
        content: The sum of the images' hashes; see :func:`scale_mae.evaluation.image_loader.content_hash`.
    """

    images: int
    top1: float
    top5: float
    loss: float
    content: int


@torch.inference_mode()
def score_part(
    evaluated: EvaluatedModel,
    part: DatasetPart,
    view: ImageTransform,
    world: World,
    batch: int,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Score one classifier on a part of a data set; see :func:`score_classifiers`."""

    def logits(images_BHW3: Tensor) -> Tensor:
        outputs: Tensor = evaluated.model(normalize(images_BHW3.to(world.device), evaluated.mean, evaluated.std))
        return outputs[None]

    return score_classifiers(logits, part, view, world, batch, progress)[0]


def score_classifiers(
    logits: Callable[[Tensor], Tensor],
    part: DatasetPart,
    view: ImageTransform,
    world: World,
    batch: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Score several classifiers on the same images. All processes call it.

    Each process takes every ``world.size``-th image. No image is repeated to fill a batch.

    Args:
        logits: Maps uint8 images ``[B, H, W, 3]`` on the host to outputs ``[N, B, C]`` on this process's device. All
            processes call it equally often, because a model that ZeRO-3 shards needs that.
        part: The images.
        view: Turns encoded images into pixels.
        world: The process group.
        batch: Images per batch and process.
        progress: Receives (images done by this process, all of its images).

    Returns:
        One score for each of the N classifiers.

    Raises:
        UserError: An image cannot be read, an output is not finite, or an image was scored twice or not at all. All
            processes raise it.
    """
    mine = range(world.rank, len(part.index), world.size)
    found = world.all_gather(world.run_on_all(lambda: _placed(logits, part, view, mine, batch, world.size, progress)))
    count = len(found[0][0])
    places, losses = np.full((count, len(part.index)), -1, np.int64), np.zeros((count, len(part.index)))
    for rank, (place, loss, _) in enumerate(found):
        places[:, rank :: world.size], losses[:, rank :: world.size] = place, loss
    counted = sum(place.shape[1] for place, _, _ in found)
    if counted != len(part.index) or (places < 0).any():
        raise UserError(f"{part.name}: {counted} images were scored, but it has {len(part.index)}")
    content = sum(content for _, _, content in found) % 2**CONTENT_BITS
    top1, top5, loss = (places < 1).mean(axis=1), (places < 5).mean(axis=1), losses.mean(axis=1)
    return [Score(counted, float(top1[n]), float(top5[n]), float(loss[n]), content) for n in range(count)]


def _placed(
    logits: Callable[[Tensor], Tensor],
    part: DatasetPart,
    view: ImageTransform,
    rows: range,
    batch: int,
    processes: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[NDArray[np.int64], NDArray[np.float64], int]:
    """Return the rank of the true class (0: largest output) and the loss of each image, both ``[N, n]``, and the sum of the
    images' hashes."""
    targets, competing = part.targets()
    places: list[NDArray[np.int64]] = []
    losses: list[NDArray[np.float64]] = []
    content = done = turns = 0
    problem: UserError | None = None
    try:
        for viewed in load_images(part.index, rows, view, batch):
            turns += 1
            outputs_NBC = logits(viewed.images).float()
            outputs_NBC = outputs_NBC if competing is None else outputs_NBC[:, :, competing]
            if not outputs_NBC.isfinite().all():
                first = part.index.location(viewed.rows[0])
                raise UserError(f"{part.name}: the model's output is not finite for {first} or a later image of its batch")
            flat = outputs_NBC.flatten(0, 1)
            target = torch.from_numpy(targets[list(viewed.rows)]).to(flat.device).repeat(len(outputs_NBC))
            shape = outputs_NBC.shape[:2]
            places.append(class_rank(flat, target).view(shape).cpu().numpy())
            losses.append(functional.cross_entropy(flat, target, reduction="none").view(shape).double().cpu().numpy())
            content += viewed.content
            done += len(viewed.rows)
            if progress:
                progress(done, len(rows))
    except UserError as error:  # the other processes must not wait for this one during a forward pass
        problem = error
    most = -(-len(range(0, len(part.index), processes)) // batch)
    blank = torch.zeros(1, view.side, view.side, 3, dtype=torch.uint8)
    for _ in range(most - turns):
        count = len(logits(blank))
        if not places:
            places, losses = [np.zeros((count, 0), np.int64)], [np.zeros((count, 0))]
    if problem:
        raise problem
    return np.concatenate(places, axis=1), np.concatenate(losses, axis=1), content


def class_rank(logits_BC: Tensor, targets_B: Tensor) -> Tensor:
    """Return the rank of the true class by output: 0 is the largest. Equal outputs keep the class order."""
    own_B1 = logits_BC.gather(1, targets_B[:, None])
    classes_C = torch.arange(logits_BC.shape[1], device=logits_BC.device)
    before_BC = (logits_BC > own_B1) | ((logits_BC == own_B1) & (classes_C < targets_B[:, None]))
    return before_BC.sum(dim=1)
