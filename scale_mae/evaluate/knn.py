"""Nearest-neighbour classification on frozen features (Wu et al. 2018): a quick, parameter-free look at an encoder."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from scale_mae.data.build import open_source
from scale_mae.data.index import Index, index_of
from scale_mae.data.loader import decode_sample
from scale_mae.data.pillow import central_square
from scale_mae.data.pixels import normalise
from scale_mae.data.sources import NO_LABEL
from scale_mae.data.storage import DataError
from scale_mae.resources import available_cores

TEMPERATURE = 0.07
BATCH = 64


@dataclass(frozen=True)
class KNNResult:
    """``top1`` in [0, 1] over ``images`` validation images, with ``k`` neighbours."""

    top1: float
    images: int
    k: int


@torch.inference_mode()
def features(encoder: VisionTransformer, index: Index) -> Tensor:
    """Mean of the patch tokens after the final norm, of unit length, ``[N, D]`` on the host.

    Images are resized whole centre square to the encoder's size, without augmentation.
    """
    device = next(encoder.parameters()).device
    cfg = encoder.pretrained_cfg
    size, mean, std = tuple(cfg["input_size"][1:]), cfg["mean"], cfg["std"]

    def load(sample: int) -> Tensor:
        entry = index.entries[sample]
        crop = central_square(int(entry["width"]), int(entry["height"]))
        return torch.tensor(decode_sample(index, sample, crop, size))

    found = []
    with ThreadPoolExecutor(available_cores()) as pool:
        for start in range(0, len(index), BATCH):
            images = torch.stack(list(pool.map(load, range(start, min(start + BATCH, len(index))))))
            tokens = encoder.forward_features(normalise(images.to(device), mean, std))
            found.append(tokens[:, 1:].mean(dim=1).float().cpu())
    return torch.nn.functional.normalize(torch.cat(found), dim=1)


def vote(train: Tensor, labels: Tensor, queries: Tensor, k: int) -> Tensor:
    """Class of each query ``[Q, D]`` by the ``k`` most similar rows of ``train`` ``[N, D]``, weighted by
    ``exp(similarity / 0.07)``; ``labels`` ``[N]``. Returns ``[Q]``."""
    classes = int(labels.max()) + 1
    predicted = []
    for part in torch.split(queries, 1024):
        similarity, neighbours = (part @ train.T).topk(k, dim=1)
        votes = torch.zeros(len(part), classes)
        votes.scatter_add_(1, labels[neighbours], (similarity / TEMPERATURE).exp())
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)


def knn_accuracy(encoder: VisionTransformer, train: str, val: str, k: int = 20) -> KNNResult:
    """Top-1 accuracy of an encoder's features.

    Args:
        encoder: from :func:`scale_mae.load_encoder`.
        train: source of labelled images (class folders, tar shards, ``demo:train``).
        val: likewise.
        k: neighbours.

    Raises:
        DataError: a source is missing, unlabelled or too small.
    """
    if k < 1:
        raise DataError(f"--k {k}: at least one neighbour has to vote")
    known, asked = (_labelled(source) for source in (train, val))
    if len(known) < k:
        raise DataError(f"{train}: holds {len(known)} images, fewer than k={k}")
    if list(known.classes) != list(asked.classes):
        raise DataError(f"{train} and {val}: their classes differ")
    train_labels, val_labels = (torch.from_numpy(i.entries["label"].astype(np.int64)) for i in (known, asked))
    predicted = vote(features(encoder, known), train_labels, features(encoder, asked), k)
    return KNNResult((predicted == val_labels).float().mean().item(), len(asked), k)


def _labelled(source: str) -> Index:
    index = open_source(source)
    if len(index.quarantined) and not index_of(source):  # who gives an index knows what it leaves out
        raise DataError(
            f"{source}: {len(index.quarantined)} images cannot be used ({index.causes()}); scale-mae index names them"
        )
    if (index.entries["label"] == NO_LABEL).any():
        raise DataError(f"{source}: some images have no label")
    return index
