"""Features of images by a frozen encoder: one vector each, computed once, by one of the processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from scale_mae.data.errors import DataError
from scale_mae.data.image_list import NO_LABEL
from scale_mae.data.index import Index, existing_index
from scale_mae.data.index_builder import list_source
from scale_mae.data.transforms import normalize
from scale_mae.distributed.process_group import World
from scale_mae.evaluation.classifier import Encoder, Subject
from scale_mae.evaluation.image_loader import CONTENT_BITS, views, whole_view
from scale_mae.evaluation.results import content_digest

Pool = Literal["mean", "token"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Source:
    """A labelled source: its name and its images."""

    name: str
    index: Index

    @classmethod
    def labelled(cls, source: str) -> Source:
        """Open it.

        Raises:
            DataError: it is missing, or some images have no label or cannot be used.
        """
        index = list_source(source)
        if len(index.quarantined) and not existing_index(source):  # who gives an index knows what it leaves out
            raise DataError(f"{source}: {len(index.quarantined)} images cannot be used ({index.quarantine_counts()})")
        if (index.entries["label"] == NO_LABEL).any():
            raise DataError(f"{source}: some images have no label")
        return cls(source, index)

    @property
    def labels(self) -> Tensor:
        """Class numbers, ``[N]``."""
        return torch.from_numpy(self.index.entries["label"].astype(np.int64))


@dataclass(frozen=True)
class Features:
    """Features of this process's images, ``[n, D]`` fp32 on the host, with the rows of the index they belong to and the sum of
    the images' contents (:func:`scale_mae.evaluation.image_loader.content_of`)."""

    rows: Sequence[int]
    values: Tensor
    content: int


def pooled(encoder: Encoder, images_B3HW: Tensor, pool: Pool = "mean") -> Tensor:
    """``[B, D]``: the mean of the patch tokens, or the class token, after the final norm, wherever the encoder has it."""
    tokens = encoder.forward_features(images_B3HW)
    vector = tokens[:, 0] if pool == "token" else tokens[:, encoder.num_prefix_tokens :].mean(dim=1)
    normed: Tensor = encoder.fc_norm(vector)
    return normed


@torch.inference_mode()
def features(
    subject: Subject, index: Index, rows: Sequence[int], batch: int, pool: Pool = "mean", progress: Progress | None = None
) -> Features:
    """Features of some images: the whole central square, scaled to the encoder's size, without augmentation.

    Args:
        subject: the encoder, on the device that computes.
        index: the images.
        rows: which of them.
        batch: images at a time.
        pool: how tokens become one vector.
        progress: called with (images done, all of ``rows``).

    Raises:
        DataError: an image cannot be read or decoded; names it.
    """
    device, width = subject.model.cls_token.device, subject.model.embed_dim
    found, content, done = [torch.zeros(0, width)], 0, 0
    for viewed in views(index, rows, whole_view(subject.size), batch):
        images = normalize(viewed.images.to(device), subject.mean, subject.std)
        found.append(pooled(subject.model, images, pool).float().cpu())
        content += viewed.content
        done += len(viewed.rows)
        if progress:
            progress(done, len(rows))
    return Features(rows, torch.cat(found), content % 2**CONTENT_BITS)


def own_features(subject: Subject, index: Index, world: World, batch: int, progress: Progress | None = None) -> Features:
    """Features of every ``world.size``-th image. All processes call it; what one cannot read is an error on all."""
    subject.model.to(world.device)
    rows = range(world.rank, len(index), world.size)
    return world.run_on_all(lambda: features(subject, index, rows, batch, progress=progress))


def gathered(found: Features, world: World) -> Tensor:
    """The features of all processes in the order of the index, ``[N, D]``, on every process."""
    parts = world.all_gather(found.values)
    whole = torch.empty(sum(len(part) for part in parts), parts[0].shape[1])
    for rank, part in enumerate(parts):
        whole[rank :: world.size] = part
    return whole


def data_facts(train: Source, val: Source, world: World, found: tuple[Features, Features]) -> dict[str, object]:
    """What a result file says of the two sources; ``images`` is the number classified."""
    sums = [sum(world.all_gather(each.content)) % 2**CONTENT_BITS for each in found]
    return {
        "train": train.name,
        "val": val.name,
        "train_images": len(train.index),
        "images": len(val.index),
        "digest": content_digest(sums),
    }


def check_classes(train: Source, val: Source) -> None:
    """Two sources have to agree on their classes.

    Raises:
        DataError: they do not.
    """
    if list(train.index.classes) != list(val.index.classes):
        raise DataError(f"{train.name} and {val.name}: their classes differ")
