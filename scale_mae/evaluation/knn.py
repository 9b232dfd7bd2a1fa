"""k-nearest-neighbor classification on frozen features (Wu et al. 2018). It has no parameters to train."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.nn.functional import normalize

from scale_mae.data.errors import DataError
from scale_mae.distributed.process_group import World
from scale_mae.evaluation.features import (
    LabeledSource,
    Progress,
    data_metadata,
    gather_features,
    local_features,
    require_same_classes,
)
from scale_mae.evaluation.models import EvaluatedModel
from scale_mae.evaluation.results import Result, measurement_metadata, model_metadata

TEMPERATURE = 0.07
QUERIES, BANK = 1024, 1 << 16  # rows per comparison: 256 MiB of similarities


def find_nearest(train: Tensor, labels: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the similarities and labels of the ``k`` nearest neighbors of each query, each ``[Q, k]``.

    Args:
        train: Normalized features of the training images, ``[N, D]``. It may be on another device.
        labels: Their classes, ``[N]``.
        queries: Normalized features to classify, ``[Q, D]``.
        k: The number of neighbors. If there are fewer training images, all are neighbors.
    """
    parts = []
    for some in torch.split(queries, QUERIES):
        best, classes = some.new_empty(len(some), 0), labels.new_empty(len(some), 0).to(some.device)
        for rows, own in zip(torch.split(train, BANK), torch.split(labels, BANK), strict=True):
            similarity, place = (some @ rows.to(some.device).T).topk(min(k, len(rows)), dim=1)
            pair = torch.cat([best, similarity], dim=1), torch.cat([classes, own.to(some.device)[place]], dim=1)
            best, classes = _largest(*pair, k)
        parts.append((best, classes))
    return torch.cat([best for best, _ in parts]), torch.cat([classes for _, classes in parts])


def _largest(similarity_QN: Tensor, classes_QN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best, place = similarity_QN.topk(min(k, similarity_QN.shape[1]), dim=1)
    return best, classes_QN.gather(1, place)


def vote(similarity_QK: Tensor, classes_QK: Tensor, classes: int) -> Tensor:
    """Return the predicted class of each query, ``[Q]``. Each neighbor votes with weight ``exp(similarity / 0.07)``."""
    votes = torch.zeros(len(similarity_QK), classes, device=similarity_QK.device)
    votes.scatter_add_(1, classes_QK, (similarity_QK / TEMPERATURE).exp())
    return votes.argmax(dim=1)


def knn_accuracy(
    evaluated: EvaluatedModel,
    train: LabeledSource,
    val: LabeledSource,
    world: World,
    k: int = 20,
    batch: int = 64,
    seed: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Measure the top-1 accuracy of an encoder's features. All processes call it.

    Each process keeps its share of the training images and compares it with all queries.

    Args:
        evaluated: The encoder.
        train: The labeled images that are the neighbors.
        val: The labeled images to classify.
        world: The process group.
        k: The number of neighbors.
        batch: Images per batch and process.
        seed: The seed of the training run, for weights that do not record it.
        progress: Receives (images of a source done by this process, all of its images).

    Raises:
        DataError: A source is too small, the classes differ, or an image cannot be read.
    """
    began = time.monotonic()
    if k < 1:
        raise DataError(f"--k {k}: must be at least 1")
    if len(train.index) < k:
        raise DataError(f"{train.name}: contains {len(train.index)} images, fewer than --k {k}")
    require_same_classes(train, val)
    own, asked = (local_features(evaluated, source.index, world, batch, progress) for source in (train, val))
    queries = normalize(gather_features(asked, world), dim=1).to(world.device)
    best, classes = find_nearest(normalize(own.values, dim=1), train.labels[world.rank :: world.size], queries, k)
    found = world.all_gather((best.cpu(), classes.cpu()))
    merged = _largest(torch.cat([each for each, _ in found], dim=1), torch.cat([each for _, each in found], dim=1), k)
    predicted = vote(*merged, int(train.labels.max()) + 1)
    protocol = {"name": "knn", "k": k, "temperature": TEMPERATURE, "size": evaluated.size, "pool": "mean"}
    return Result(
        protocol,
        model_metadata(evaluated, seed),
        data_metadata(train, val, world, (own, asked)),
        {"top1": (predicted == val.labels).double().mean().item()},
        {},
        measurement_metadata(world.size, world.device.type, time.monotonic() - began),
    )
