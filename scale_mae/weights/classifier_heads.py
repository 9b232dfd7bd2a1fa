"""Converts the head of a scale_mae classifier checkpoint to a timm head, which is one linear layer.

A linear-probe run has BatchNorm and several linear layers, one for each learning rate. BatchNorm and the selected linear layer
are folded into one linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.checkpoint.lazy_tensor import LazyTensor
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.config import Config, UserError
from scale_mae.model.sizes import PROBE_EPS

NORM, PROBES = "head.norm.", "head.probes."
MEAN, VARIANCE = f"{NORM}running_mean", f"{NORM}running_var"


@dataclass(frozen=True)
class ClassifierHead:
    """The head of a classifier checkpoint, or one of its linear probes.

    Attributes:
        classes: Names of the outputs. They are numbers, as texts, if the training images have no class names.
        probe: Number of the linear probe, ``None`` for a fine-tuned classifier.
        initialized_from: Description of the weights that the run started from.
    """

    classes: tuple[str, ...]
    probe: int | None
    initialized_from: str

    @property
    def layer(self) -> str:
        """The name of the linear layer in the checkpoint."""
        return "head" if self.probe is None else f"{PROBES}{self.probe}"


def read_head(config: Config, reader: ZeroReader, probe: int | None = None) -> ClassifierHead:
    """Return the head of a classifier checkpoint.

    Args:
        config: The configuration of the run.
        reader: The reader of the checkpoint.
        probe: Number of the linear probe, an index of ``classify.lr_multipliers``. The default is the best one.

    Raises:
        UserError: ``probe`` is out of range, or the run is not a linear probe.
        CheckpointError: The checkpoint does not contain its class names, or their number differs from that of the outputs.
    """
    try:
        state = reader.state["classifier"]
        classes, best_probe = tuple(str(name) for name in state["classes"]), int(state["best_probe"])
        initialized_from = str(state["initialized_from"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{reader.folder}: damaged (no class names).") from None
    probes = len(config.classify.lr_multipliers) if config.run.task == "linprobe" else 0
    if probe is not None and not 0 <= probe < probes:
        available = f"the run has probes 0 to {probes - 1}" if probes else f"run.task={config.run.task} has no probes"
        raise UserError(f"--probe {probe}: {available}.")
    head = ClassifierHead(classes, (best_probe if probe is None else probe) if probes else None, initialized_from)
    keys = [f"{head.layer}.weight", f"{head.layer}.bias", *((MEAN, VARIANCE) if probes else ())]
    if missing := [key for key in keys if key not in reader]:
        raise CheckpointError(f"{reader.folder}: missing key {missing[0]}.")
    if (shape := reader.shape(f"{head.layer}.bias")) != (len(classes),):
        raise CheckpointError(
            f"{reader.folder}: {head.layer}.bias has shape {list(shape)}, but there are {len(classes)} classes."
        )
    return head


def select_probe(tensors: Mapping[str, LazyTensor], head: ClassifierHead) -> dict[str, LazyTensor]:
    """Return a checkpoint's tensors without the linear probes that are not selected."""
    return {key: t for key, t in tensors.items() if not key.startswith(PROBES) or key.startswith(f"{head.layer}.")}


def to_linear_head(tensors: Mapping[str, LazyTensor], head: ClassifierHead) -> dict[str, LazyTensor]:
    """Return a checkpoint's tensors with a timm head: one linear layer ``head.weight``, ``head.bias``."""
    if head.probe is None:
        return dict(tensors)
    layer = [tensors[f"{head.layer}.{part}"] for part in ("weight", "bias")]
    parts = [*layer, tensors[MEAN], tensors[VARIANCE]]

    def read_folded(index: int) -> list[Tensor]:
        return [fold_batch_norm(*(part.read() for part in parts))[index].reshape(-1)]

    folded = {key: tensor for key, tensor in tensors.items() if not key.startswith((NORM, PROBES))}
    for index, part in enumerate(("weight", "bias")):
        folded[f"head.{part}"] = LazyTensor(layer[index].shape, torch.float32, partial(read_folded, index))
    return folded


def fold_batch_norm(weight_KD: Tensor, bias_K: Tensor, mean_D: Tensor, variance_D: Tensor) -> tuple[Tensor, Tensor]:
    """Fold BatchNorm with running statistics into the linear layer that follows it.

    ``W ((x - m) / s) + b = (W / s) x + (b - (W / s) m)``, computed in float64 and rounded to fp32.

    Args:
        weight_KD: Weight of the linear layer for K classes and D features.
        bias_K: Its bias.
        mean_D: Running mean of BatchNorm.
        variance_D: Running variance of BatchNorm.

    Returns:
        Weight ``[K, D]`` and bias ``[K]`` of the folded layer.
    """
    weight = weight_KD.double() / (variance_D.double() + PROBE_EPS).sqrt()
    return weight.float(), (bias_K.double() - weight @ mean_D.double()).float()
