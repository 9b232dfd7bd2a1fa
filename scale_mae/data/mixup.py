"""Augments batches of a classifier on their device: random erasing, mixup or CutMix, and label smoothing, as timm does.

Sources: random erasing, Zhong et al. 2017; mixup, Zhang et al. 2018; CutMix, Yun et al. 2019.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from scale_mae.config.schema import ClassifyConfig


class BatchAugmentation:
    """Augments a batch. The result depends on the batch and the seed only, and the device is never waited for.

    A batch is mixed with itself in reverse order. The result therefore depends on how a step is split into micro-batches.

    Args:
        config: Label smoothing, alphas and probabilities.
        classes: C.
    """

    def __init__(self, config: ClassifyConfig, classes: int) -> None:
        self._smoothing, self._classes = config.label_smoothing, classes
        self._erasing = RandomErasing(config.random_erasing, mode="pixel", max_count=1) if config.random_erasing else None
        self._mixup: Mixup | None = None
        if config.mixup or config.cutmix:
            alphas = {"mixup_alpha": config.mixup, "cutmix_alpha": config.cutmix, "switch_prob": config.mixup_switch_prob}
            self._mixup = Mixup(**alphas, mode="batch", label_smoothing=config.label_smoothing, num_classes=classes)

    def __call__(self, images_B3HW: Tensor, labels_B: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Augment a batch.

        Args:
            images_B3HW: Normalized images. They are changed in place. B must be even for mixup and CutMix.
            labels_B: Classes in [0, C), integers on the device of the images.
            seed: In [0, 2^64). It determines all random numbers.

        Returns:
            Images, and soft targets ``[B, C]`` in fp32 whose rows add up to 1.
        """
        with _seeded_generators(seed, images_B3HW.device):
            if self._erasing:
                self._erasing.device = images_B3HW.device
                images_B3HW = self._erasing(images_B3HW)
            if not self._mixup:
                return images_B3HW, smooth_labels(labels_B, self._classes, self._smoothing)
            images_B3HW, targets_BC = self._mixup(images_B3HW, labels_B)
        return images_B3HW, targets_BC


def smooth_labels(labels_B: Tensor, classes: int, smoothing: float) -> Tensor:
    """Spread ``smoothing`` over all classes and give the rest to the label (Szegedy et al. 2016): fp32 ``[B, classes]``."""
    off = smoothing / classes
    targets_BC = torch.full((len(labels_B), classes), off, device=labels_B.device)
    return targets_BC.scatter_(1, labels_B.long().view(-1, 1), 1 - smoothing + off)


def derive_seeds(seed: int) -> tuple[int, int, int]:
    """Derive the seeds of Python's, NumPy's and PyTorch's generator: for erased boxes, mixing, and erasing noise.

    They differ, because Python's and NumPy's generators are of the same kind.
    """
    boxes, mixing, noise = np.random.SeedSequence(seed).generate_state(3).tolist()
    return boxes, mixing, noise


@contextmanager
def _seeded_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators, from which timm draws, and restore their state afterwards."""
    state = random.getstate(), np.random.get_state()
    boxes, mixing, noise = derive_seeds(seed)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        random.seed(boxes)
        np.random.seed(mixing)
        torch.manual_seed(noise)
        try:
            yield
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])
