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
from scale_mae.data.pixels import normalise
from scale_mae.engine.distributed import World
from scale_mae.evaluate.classifier import Subject
from scale_mae.evaluate.sets import Part
from scale_mae.evaluate.views import CONTENT_BITS, View, views


@dataclass(frozen=True)
class Score:
    """What a classifier makes of some images.

    Attributes:
        images: how many.
        top1: share of images whose class gets the largest output.
        top5: share of images whose class is among the five largest.
        loss: mean cross entropy, in nats.
        content: tells which images these were, see :func:`scale_mae.evaluate.views.content_of`.
    """

    images: int
    top1: float
    top5: float
    loss: float
    content: int


@torch.inference_mode()
def score(
    subject: Subject, part: Part, view: View, ranks: World, batch: int, progress: Callable[[int, int], None] | None = None
) -> Score:
    """Score a part of a set. All processes call it; each takes every ``ranks.size``-th image, none is repeated to fill a batch.

    Args:
        subject: the model is on this process's device.
        part: the images.
        view: makes pixels of encoded images.
        ranks: the processes.
        batch: images at a time, a process.
        progress: called with (images done by this process, all of them).

    Raises:
        UserError: an image cannot be read, an output is not finite, or an image was counted twice or not at all; on every
            process.
    """
    mine = range(ranks.rank, len(part.index), ranks.size)
    found = ranks.gather(ranks.together(lambda: _placed(subject, part, view, mine, batch, progress, ranks.device)))
    places, losses = np.full(len(part.index), -1, np.int64), np.zeros(len(part.index))
    for rank, (place, loss, _) in enumerate(found):
        places[rank :: ranks.size], losses[rank :: ranks.size] = place, loss
    counted = sum(len(place) for place, _, _ in found)
    if counted != len(part.index) or (places < 0).any():
        raise UserError(f"{part.name}: {counted} images were scored, but it has {len(part.index)}")
    content = sum(content for _, _, content in found) % 2**CONTENT_BITS
    return Score(counted, float((places < 1).mean()), float((places < 5).mean()), float(losses.mean()), content)


def _placed(
    subject: Subject,
    part: Part,
    view: View,
    rows: range,
    batch: int,
    progress: Callable[[int, int], None] | None,
    device: torch.device,
) -> tuple[NDArray[np.int64], NDArray[np.float64], int]:
    """Place of the right class among the outputs (0: the first) and loss of each image, and the sum of their contents."""
    targets, competing = part.targets()
    columns = None if competing is None else torch.tensor(competing, device=device)
    places, losses, content, done = [np.zeros(0, np.int64)], [np.zeros(0)], 0, 0
    for viewed in views(part.index, rows, view, batch):
        images = normalise(viewed.images.to(device), subject.mean, subject.std)
        logits = subject.model(images).float()
        logits = logits if columns is None else logits[:, columns]
        if not logits.isfinite().all():
            raise UserError(f"{part.name}: the model's output is not finite for {part.index.where(viewed.rows[0])} or after it")
        target = torch.from_numpy(targets[list(viewed.rows)]).to(device)
        places.append(place_of(logits, target).cpu().numpy())
        losses.append(functional.cross_entropy(logits, target, reduction="none").double().cpu().numpy())
        content += viewed.content
        done += len(viewed.rows)
        if progress:
            progress(done, len(rows))
    return np.concatenate(places), np.concatenate(losses), content


def place_of(logits_BC: Tensor, targets_B: Tensor) -> Tensor:
    """Place of the right class when classes are sorted by output, 0 the largest; of equal outputs the lower class is first."""
    own_B1 = logits_BC.gather(1, targets_B[:, None])
    classes_C = torch.arange(logits_BC.shape[1], device=logits_BC.device)
    before_BC = (logits_BC > own_B1) | ((logits_BC == own_B1) & (classes_C < targets_B[:, None]))
    return before_BC.sum(dim=1)
