"""Logistic regression on frozen features: a linear classifier without a training schedule."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

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

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
HELD_OUT = 5  # every fifth training image, in an order drawn with seed 0, is held out to choose the penalty
STEPS = 500


def fit_logistic_regression(
    features_ND: Tensor, labels_N: Tensor, classes: int, l2: float, start: Tensor | None = None
) -> Tensor:
    """Return weights and biases ``[D + 1, classes]`` that minimize mean cross entropy + ``l2 / 2 * |weights|^2``, by L-BFGS.

    Args:
        features_ND: Standardized features.
        labels_N: Class numbers.
        classes: The number of classes.
        l2: The penalty. It does not apply to biases.
        start: The initial solution. ``None``: zeros.
    """
    device, width = features_ND.device, features_ND.shape[1]
    solution = torch.zeros(width + 1, classes, device=device) if start is None else start.clone()
    solution.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [solution], max_iter=STEPS, tolerance_grad=1e-6, tolerance_change=1e-9, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(logits(solution, features_ND), labels_N) + l2 / 2 * solution[:-1].square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return solution.detach()


def logits(solution: Tensor, features_ND: Tensor) -> Tensor:
    """Return the logits, ``[N, classes]``."""
    return features_ND @ solution[:-1] + solution[-1]


def choose_penalty(features_ND: Tensor, labels_N: Tensor, classes: int) -> float:
    """Return the value of :data:`PENALTIES` that classifies held-out training images best; the largest of equal ones."""
    order = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(0)).to(features_ND.device)
    held, rest = order[::HELD_OUT], torch.cat([order[first::HELD_OUT] for first in range(1, HELD_OUT)])
    best, chosen, solution = -1.0, PENALTIES[-1], None
    for l2 in sorted(PENALTIES, reverse=True):  # each fit starts from the solution for the stronger penalty
        solution = fit_logistic_regression(features_ND[rest], labels_N[rest], classes, l2, solution)
        right = float((logits(solution, features_ND[held]).argmax(dim=1) == labels_N[held]).double().mean())
        if right > best:
            best, chosen = right, l2
    return chosen


def logistic_regression_accuracy(
    evaluated: EvaluatedModel,
    train: LabeledSource,
    val: LabeledSource,
    world: World,
    batch: int = 64,
    seed: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Measure the top-1 accuracy of a logistic regression. All processes compute features; rank 0 fits.

    Args:
        evaluated: The encoder.
        train: The labeled images to fit on.
        val: The labeled images to classify.
        world: The process group.
        batch: Images per batch and process.
        seed: The seed of the training run, for weights that do not record it.
        progress: Receives (images of a source done by this process, all of its images).

    Raises:
        DataError: A source is too small, the classes differ, or an image cannot be read.
    """
    began = time.monotonic()
    require_same_classes(train, val)
    if len(train.index) < 2 * HELD_OUT:
        raise DataError(f"{train.name}: contains {len(train.index)} images; logistic regression needs at least {2 * HELD_OUT}")
    found = tuple(local_features(evaluated, source.index, world, batch, progress) for source in (train, val))
    known, asked = (gather_features(each, world).to(world.device) for each in found)
    deviation, mean = torch.std_mean(known, dim=0)
    known, asked = ((each - mean) / deviation.clamp_min(1e-6) for each in (known, asked))
    labels, wanted = train.labels.to(world.device), val.labels.to(world.device)
    classes = int(max(labels.max(), wanted.max())) + 1

    def learn() -> tuple[float, float, float]:
        l2 = choose_penalty(known, labels, classes)
        outputs = logits(fit_logistic_regression(known, labels, classes, l2), asked)
        return l2, (outputs.argmax(dim=1) == wanted).double().mean().item(), cross_entropy(outputs, wanted).item()

    l2, top1, loss = world.run_on_main(learn)
    return Result(
        {"name": "logistic", "size": evaluated.size, "pool": "mean", "penalties": list(PENALTIES), "held_out": HELD_OUT},
        model_metadata(evaluated, seed),
        data_metadata(train, val, world, (found[0], found[1])),
        {"top1": top1, "loss": loss},
        {"chosen": {"l2": l2}},
        measurement_metadata(world.size, world.device.type, time.monotonic() - began),
    )
