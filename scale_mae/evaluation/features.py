"""Computes the features of a frozen encoder: one vector per image. One process computes each image, once."""

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
from scale_mae.evaluation.image_loader import CONTENT_BITS, full_square_transform, load_images
from scale_mae.evaluation.models import Encoder, EvaluatedModel
from scale_mae.evaluation.results import content_digest

Pool = Literal["mean", "token"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LabeledSource:
    """A labeled source: its name and its images."""

    name: str
    index: Index

    @classmethod
    def open(cls, source: str) -> LabeledSource:
        """Open a source.

        Raises:
            DataError: The source is missing, or an image has no label or cannot be read.
        """
        index = list_source(source)
        if len(index.quarantined) and not existing_index(source):  # an index has reported its unreadable images before
            raise DataError(f"{source}: {len(index.quarantined)} images cannot be read ({index.quarantine_counts()})")
        if (index.entries["label"] == NO_LABEL).any():
            raise DataError(f"{source}: some images have no label; use a labeled source")
        return cls(source, index)

    @property
    def labels(self) -> Tensor:
        """The class numbers, ``[N]``."""
        return torch.from_numpy(self.index.entries["label"].astype(np.int64))


@dataclass(frozen=True)
class Features:
    """Features of some images.

    Attributes:
        rows: The images' rows in the index.
        values: The features, ``[n, D]`` fp32 on the host.
        content: The sum of the images' hashes (:func:`scale_mae.evaluation.image_loader.content_hash`).
    """

    rows: Sequence[int]
    values: Tensor
    content: int


def pool_tokens(encoder: Encoder, images_B3HW: Tensor, pool: Pool = "mean") -> Tensor:
    """Return the mean of the patch tokens or the class token, ``[B, D]``, after the encoder's final norm."""
    tokens = encoder.forward_features(images_B3HW)
    vector = tokens[:, 0] if pool == "token" else tokens[:, encoder.num_prefix_tokens :].mean(dim=1)
    normed: Tensor = encoder.fc_norm(vector)
    return normed


@torch.inference_mode()
def features(
    evaluated: EvaluatedModel,
    index: Index,
    rows: Sequence[int],
    batch: int,
    pool: Pool = "mean",
    progress: Progress | None = None,
) -> Features:
    """Compute features of the largest centered square, resized to the encoder's size, without augmentation.

    Args:
        evaluated: The encoder, on its device.
        index: The images.
        rows: The rows to compute.
        batch: Images per batch.
        pool: The pooling of the tokens.
        progress: Receives (images done, all images of ``rows``).

    Raises:
        DataError: An image cannot be read or decoded; the message names it.
    """
    device, width = evaluated.model.cls_token.device, evaluated.model.embed_dim
    found, content, done = [torch.zeros(0, width)], 0, 0
    for viewed in load_images(index, rows, full_square_transform(evaluated.size), batch):
        images = normalize(viewed.images.to(device), evaluated.mean, evaluated.std)
        found.append(pool_tokens(evaluated.model, images, pool).float().cpu())
        content += viewed.content
        done += len(viewed.rows)
        if progress:
            progress(done, len(rows))
    return Features(rows, torch.cat(found), content % 2**CONTENT_BITS)


def local_features(
    evaluated: EvaluatedModel, index: Index, world: World, batch: int, progress: Progress | None = None
) -> Features:
    """Compute the features of every ``world.size``-th image. All processes call it. An error on one is raised on all."""
    evaluated.model.to(world.device)
    rows = range(world.rank, len(index), world.size)
    return world.run_on_all(lambda: features(evaluated, index, rows, batch, progress=progress))


def gather_features(found: Features, world: World) -> Tensor:
    """Return the features of all processes in the order of the index, ``[N, D]``, on every process."""
    parts = world.all_gather(found.values)
    whole = torch.empty(sum(len(part) for part in parts), parts[0].shape[1])
    for rank, part in enumerate(parts):
        whole[rank :: world.size] = part
    return whole


def data_metadata(
    train: LabeledSource, val: LabeledSource, world: World, found: tuple[Features, Features]
) -> dict[str, object]:
    """Return the description of the two sources in a result file. ``images`` is the number of classified images."""
    sums = [sum(world.all_gather(each.content)) % 2**CONTENT_BITS for each in found]
    return {
        "train": train.name,
        "val": val.name,
        "train_images": len(train.index),
        "images": len(val.index),
        "digest": content_digest(sums),
    }


def require_same_classes(train: LabeledSource, val: LabeledSource) -> None:
    """Check that two sources have the same classes.

    Raises:
        DataError: They differ.
    """
    if list(train.index.classes) != list(val.index.classes):
        raise DataError(f"{train.name} and {val.name}: their classes differ")
