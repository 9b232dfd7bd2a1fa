"""Nearest-neighbour classification on frozen features (Wu et al. 2018): a quick, parameter-free look at an encoder."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.nn.functional import normalize

from scale_mae.data.errors import DataError
from scale_mae.distributed.process_group import World
from scale_mae.evaluation.classifier import Subject
from scale_mae.evaluation.features import Progress, Source, check_classes, data_facts, gathered, own_features
from scale_mae.evaluation.results import Result, made_by, model_facts

TEMPERATURE = 0.07
QUERIES, BANK = 1024, 1 << 16  # rows compared at a time: 256 MiB of similarities


def nearest(train: Tensor, labels: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` most similar rows of ``train`` ``[N, D]`` (all, if there are fewer) for each of ``queries`` ``[Q, D]``, found
    piece by piece: similarities and labels, each ``[Q, k]``, on the device of ``queries``."""
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


def decide(similarity_QK: Tensor, classes_QK: Tensor, classes: int) -> Tensor:
    """The class of each query, ``[Q]``: each neighbour votes with ``exp(similarity / 0.07)``."""
    votes = torch.zeros(len(similarity_QK), classes, device=similarity_QK.device)
    votes.scatter_add_(1, classes_QK, (similarity_QK / TEMPERATURE).exp())
    return votes.argmax(dim=1)


def knn_accuracy(
    subject: Subject,
    train: Source,
    val: Source,
    world: World,
    k: int = 20,
    batch: int = 64,
    seed: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Top-1 accuracy of an encoder's features. All processes call it; each keeps its share of the training images, and all
    compare it with all queries.

    Args:
        subject: the encoder.
        train: labelled images to compare with.
        val: labelled images to classify.
        world: the processes.
        k: neighbours.
        batch: images at a time, a process.
        seed: of the encoder's training, if its weights do not say.
        progress: called with (images of a source done by this process, all of them).

    Raises:
        DataError: a source is too small, their classes differ, or an image cannot be read.
    """
    began = time.monotonic()
    if k < 1:
        raise DataError(f"--k {k}: at least one neighbour has to vote")
    if len(train.index) < k:
        raise DataError(f"{train.name}: holds {len(train.index)} images, fewer than k={k}")
    check_classes(train, val)
    own, asked = (own_features(subject, source.index, world, batch, progress) for source in (train, val))
    queries = normalize(gathered(asked, world), dim=1).to(world.device)
    best, classes = nearest(normalize(own.values, dim=1), train.labels[world.rank :: world.size], queries, k)
    found = world.all_gather((best.cpu(), classes.cpu()))
    merged = _largest(torch.cat([each for each, _ in found], dim=1), torch.cat([each for _, each in found], dim=1), k)
    predicted = decide(*merged, int(train.labels.max()) + 1)
    protocol = {"name": "knn", "k": k, "temperature": TEMPERATURE, "size": subject.size, "pool": "mean"}
    return Result(
        protocol,
        model_facts(subject, seed),
        data_facts(train, val, world, (own, asked)),
        {"top1": (predicted == val.labels).double().mean().item()},
        {},
        made_by(world.size, world.device.type, time.monotonic() - began),
    )
