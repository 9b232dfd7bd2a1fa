"""What becomes of a classifier's batch on its device: timm's random erasing and mixup or CutMix, and soft targets.

Random erasing: Zhong et al. 2017; mixup: Zhang et al. 2018; CutMix: Yun et al. 2019.
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

from scale_mae.config.sections import ClassifyConfig


class BatchAugmentation:
    """Changes a batch by what its seed draws, whatever the state of other generators, and without waiting for the device.

    A batch is mixed with itself in reverse order, so that the result depends on how the images of a step are cut into
    micro-batches.

    Args:
        config: smoothing, alphas and probabilities.
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
        """Images and soft targets ``[B, C]`` in fp32, whose rows add up to 1.

        Args:
            images_B3HW: normalised; changed in place. B is even where images are mixed.
            labels_B: classes in [0, C), integers on the images' device.
            seed: in [0, 2^64), of everything random.
        """
        with _seeded(seed, images_B3HW.device):
            if self._erasing:
                self._erasing.device = images_B3HW.device
                images_B3HW = self._erasing(images_B3HW)
            if not self._mixup:
                return images_B3HW, smooth_labels(labels_B, self._classes, self._smoothing)
            images_B3HW, targets_BC = self._mixup(images_B3HW, labels_B)
        return images_B3HW, targets_BC


def smooth_labels(labels_B: Tensor, classes: int, smoothing: float) -> Tensor:
    """``smoothing`` spread over all classes and the rest on the label's (Szegedy et al. 2016): fp32 ``[B, classes]``."""
    off = smoothing / classes
    targets_BC = torch.full((len(labels_B), classes), off, device=labels_B.device)
    return targets_BC.scatter_(1, labels_B.long().view(-1, 1), 1 - smoothing + off)


def seeds(seed: int) -> tuple[int, int, int]:
    """Seeds of the boxes that are erased, of what is mixed, and of the noise; apart, since two generators are of one kind."""
    boxes, mixes, pixels = np.random.SeedSequence(seed).generate_state(3).tolist()
    return boxes, mixes, pixels


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """timm draws from the generators of the whole process: they are seeded for it, and given back as they were."""
    kept = random.getstate(), np.random.get_state()
    boxes, mixes, pixels = seeds(seed)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        random.seed(boxes)
        np.random.seed(mixes)
        torch.manual_seed(pixels)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
