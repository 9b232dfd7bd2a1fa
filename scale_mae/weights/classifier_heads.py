"""Checkpoints of our own classifiers under timm's names: of a linear probe, BatchNorm and one probe become one linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from scale_mae.checkpoint.safetensors_io import LazyTensor
from scale_mae.checkpoint.store import CheckpointError
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.config import Config, UserError
from scale_mae.model.sizes import PROBE_EPS

NORM, PROBES = "head.norm.", "head.probes."
MEAN, VARIANCE = f"{NORM}running_mean", f"{NORM}running_var"


@dataclass(frozen=True)
class Head:
    """The head of a checkpoint that is meant.

    Attributes:
        classes: names of its outputs; numbers, as texts, where the images it was trained on have no names of classes.
        probe: number of a linear probe; None of what was fine-tuned.
        began_with: what the run began with, in words.
    """

    classes: tuple[str, ...]
    probe: int | None
    began_with: str

    @property
    def layer(self) -> str:
        """What its linear layer is called in the checkpoint."""
        return "head" if self.probe is None else f"{PROBES}{self.probe}"


def read_head(config: Config, reader: ZeroReader, probe: int | None = None) -> Head:
    """The head of a classifier's checkpoint.

    Args:
        config: of the run.
        reader: of the checkpoint.
        probe: one of ``classify.lr_multipliers``, counted from 0; None: the best.

    Raises:
        UserError: ``probe`` of what has no probes, or not so many.
        CheckpointError: the checkpoint does not say what its outputs are, or has others.
    """
    try:
        told = reader.state["classifier"]
        classes, best = tuple(str(name) for name in told["classes"]), int(told["best_probe"])
        began_with = str(told["began_with"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{reader.folder}: damaged (it does not say what its classes are)") from None
    probes = len(config.classify.lr_multipliers) if config.run.task == "linprobe" else 0
    if probe is not None and not 0 <= probe < probes:
        there = f"the run has probes 0 to {probes - 1}" if probes else f"run.task={config.run.task} has none"
        raise UserError(f"--probe {probe}: {there}")
    head = Head(classes, (best if probe is None else probe) if probes else None, began_with)
    needed = [f"{head.layer}.weight", f"{head.layer}.bias", *((MEAN, VARIANCE) if probes else ())]
    if missing := [name for name in needed if name not in reader]:
        raise CheckpointError(f"{reader.folder}: {missing[0]} is missing")
    if (rows := reader.shape(f"{head.layer}.bias")) != (len(classes),):
        raise CheckpointError(f"{reader.folder}: {head.layer}.bias has shape {list(rows)} for {len(classes)} classes")
    return head


def chosen(tensors: Mapping[str, LazyTensor], head: Head) -> dict[str, LazyTensor]:
    """A checkpoint's tensors without the probes that are not meant."""
    return {n: t for n, t in tensors.items() if not n.startswith(PROBES) or n.startswith(f"{head.layer}.")}


def plain(tensors: Mapping[str, LazyTensor], head: Head) -> dict[str, LazyTensor]:
    """A checkpoint's tensors as those of a timm classifier, whose head is one linear layer."""
    if head.probe is None:
        return dict(tensors)
    layer = [tensors[f"{head.layer}.{part}"] for part in ("weight", "bias")]
    parts = [*layer, tensors[MEAN], tensors[VARIANCE]]

    def folded(which: int) -> list[Tensor]:
        return [fold(*(part.read() for part in parts))[which].reshape(-1)]

    found = {name: tensor for name, tensor in tensors.items() if not name.startswith((NORM, PROBES))}
    for which, part in enumerate(("weight", "bias")):
        found[f"head.{part}"] = LazyTensor(layer[which].shape, torch.float32, partial(folded, which))
    return found


def fold(weight_KD: Tensor, bias_K: Tensor, mean_D: Tensor, variance_D: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the linear layer that does what BatchNorm with running statistics and a linear layer do.

    ``W ((x - m) / s) + b = (W / s) x + (b - (W / s) m)``, computed in float64 and rounded to fp32.
    """
    weight = weight_KD.double() / (variance_D.double() + PROBE_EPS).sqrt()
    return weight.float(), (bias_K.double() - weight @ mean_D.double()).float()
