"""Accuracy of a classifier on a set, exact under any number of processes: each image is looked at once, by one of them."""

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
from scale_mae.evaluation.classifier import Subject
from scale_mae.evaluation.datasets import Part
from scale_mae.evaluation.image_loader import CONTENT_BITS, View, views


@dataclass(frozen=True)
class Score:
    """What a classifier makes of some images.

    Attributes:
        images: how many.
        top1: share of images whose class gets the largest output.
        top5: share of images whose class is among the five largest.
        loss: mean cross entropy, in nats.
        content: tells which images these were, see :func:`scale_mae.evaluation.image_loader.content_of`.
    """

    images: int
    top1: float
    top5: float
    loss: float
    content: int


@torch.inference_mode()
def score(
    subject: Subject, part: Part, view: View, world: World, batch: int, progress: Callable[[int, int], None] | None = None
) -> Score:
    """Score a part of a set; see :func:`scores`."""

    def logits(images_BHW3: Tensor) -> Tensor:
        outputs: Tensor = subject.model(normalize(images_BHW3.to(world.device), subject.mean, subject.std))
        return outputs[None]

    return scores(logits, part, view, world, batch, progress)[0]


def scores(
    logits: Callable[[Tensor], Tensor],
    part: Part,
    view: View,
    world: World,
    batch: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Score classifiers that look at the same images. All processes call it; each takes every ``world.size``-th image, none is
    repeated to fill a batch.

    Args:
        logits: uint8 images ``[B, H, W, 3]`` on the host to outputs ``[N, B, C]`` on this process's device; called equally
            often on all processes, as models whose weights lie on several need it.
        part: the images.
        view: makes pixels of encoded images.
        world: the processes.
        batch: images at a time, a process.
        progress: called with (images done by this process, all of them).

    Returns:
        A score for each of N.

    Raises:
        UserError: an image cannot be read, an output is not finite, or an image was counted twice or not at all; on every
            process.
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
    part: Part,
    view: View,
    rows: range,
    batch: int,
    processes: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[NDArray[np.int64], NDArray[np.float64], int]:
    """Place of the right class among the outputs (0: the first) and loss of each image, ``[N, n]``, and the sum of their
    contents."""
    targets, competing = part.targets()
    places: list[NDArray[np.int64]] = []
    losses: list[NDArray[np.float64]] = []
    content = done = turns = 0
    problem: UserError | None = None
    try:
        for viewed in views(part.index, rows, view, batch):
            turns += 1
            outputs_NBC = logits(viewed.images).float()
            outputs_NBC = outputs_NBC if competing is None else outputs_NBC[:, :, competing]
            if not outputs_NBC.isfinite().all():
                first = part.index.location(viewed.rows[0])
                raise UserError(f"{part.name}: the model's output is not finite for {first} or after it")
            flat = outputs_NBC.flatten(0, 1)
            target = torch.from_numpy(targets[list(viewed.rows)]).to(flat.device).repeat(len(outputs_NBC))
            shape = outputs_NBC.shape[:2]
            places.append(place_of(flat, target).view(shape).cpu().numpy())
            losses.append(functional.cross_entropy(flat, target, reduction="none").view(shape).double().cpu().numpy())
            content += viewed.content
            done += len(viewed.rows)
            if progress:
                progress(done, len(rows))
    except UserError as error:  # the others must not wait for this process in the middle of a forward pass
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


def place_of(logits_BC: Tensor, targets_B: Tensor) -> Tensor:
    """Place of the right class when classes are sorted by output, 0 the largest; of equal outputs the lower class is first."""
    own_B1 = logits_BC.gather(1, targets_B[:, None])
    classes_C = torch.arange(logits_BC.shape[1], device=logits_BC.device)
    before_BC = (logits_BC > own_B1) | ((logits_BC == own_B1) & (classes_C < targets_B[:, None]))
    return before_BC.sum(dim=1)
