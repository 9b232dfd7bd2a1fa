"""What becomes of a classifier's batch on its device: random erasing, mixup or CutMix, and soft targets; drawn as timm draws.

Random erasing: Zhong et al. 2017; mixup: Zhang et al. 2018; CutMix: Yun et al. 2019.
"""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from torch import Tensor

from scale_mae.sections import ClassifyConfig

ERASED = (0.02, 1 / 3)  # least and largest share of the area
ASPECT = 0.3  # smallest height / width of what is erased; the largest is its inverse
_TRIES = 10
Box = tuple[int, int, int, int]


class Mixing:
    """Changes a batch by what its seed draws, whatever the state of other generators, and without waiting for the device.

    Everything is computed as timm's RandomErasing (mode pixel), then Mixup (mode batch, always on) do. A batch is mixed with
    itself in reverse order, so that the result depends on how the images of a step are cut into micro-batches.

    Args:
        config: smoothing, alphas and probabilities.
        classes: C.
    """

    def __init__(self, config: ClassifyConfig, classes: int) -> None:
        self._config, self._classes = config, classes

    def __call__(self, images_B3HW: Tensor, labels_B: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Images and soft targets ``[B, C]`` in fp32, whose rows add up to 1.

        Args:
            images_B3HW: normalised; changed in place. B is even where images are mixed.
            labels_B: classes in [0, C), integers on the images' device.
            seed: in [0, 2^64), of everything random.
        """
        boxes, mixes, pixels = seeds(seed)
        if self._config.erasing:
            _erase(images_B3HW, self._config.erasing, boxes, pixels)
        targets_BC = smoothed(labels_B, self._classes, self._config.smoothing)
        if not (self._config.mixup or self._config.cutmix):
            return images_B3HW, targets_BC
        share = self._mix(images_B3HW, np.random.RandomState(mixes))
        return images_B3HW, targets_BC * share + targets_BC.flip(0) * (1 - share)

    def _mix(self, images_B3HW: Tensor, generator: np.random.RandomState) -> float:
        """Mix in place; the share that is left of each image."""
        config, (height, width) = self._config, images_B3HW.shape[-2:]
        generator.random_sample()  # where timm draws whether to mix at all
        cut = bool(config.cutmix) and not (config.mixup and generator.random_sample() >= config.mix_switch)
        alpha = config.cutmix if cut else config.mixup
        share = float(generator.beta(alpha, alpha))
        if not cut:
            reversed_B3HW = images_B3HW.flip(0).mul_(1 - share)
            images_B3HW.mul_(share).add_(reversed_B3HW)
            return share
        top, left, h, w = cut_box(height, width, share, generator)
        images_B3HW[:, :, top : top + h, left : left + w] = images_B3HW[:, :, top : top + h, left : left + w].flip(0)
        return 1 - h * w / (height * width)


def seeds(seed: int) -> tuple[int, int, int]:
    """Seeds of the boxes that are erased, of what is mixed, and of the noise; apart, since two generators are of one kind."""
    boxes, mixes, pixels = np.random.SeedSequence(seed).generate_state(3).tolist()
    return boxes, mixes, pixels


def smoothed(labels_B: Tensor, classes: int, smoothing: float) -> Tensor:
    """``smoothing`` spread over all classes and the rest on the label's (Szegedy et al. 2016): fp32 ``[B, classes]``."""
    off = smoothing / classes
    targets_BC = torch.full((len(labels_B), classes), off, device=labels_B.device)
    return targets_BC.scatter_(1, labels_B.long().view(-1, 1), 1 - smoothing + off)


def _erase(images_B3HW: Tensor, probability: float, boxes: int, pixels: int) -> None:
    """Fill a box of some images with standard normal noise, in place."""
    generator, noise = random.Random(boxes), torch.Generator(images_B3HW.device).manual_seed(pixels)
    height, width = images_B3HW.shape[-2:]
    for image_3HW in images_B3HW:
        box = erased_box(height, width, generator) if generator.random() <= probability else None
        if box is not None:
            top, left, h, w = box
            drawn_3hw = torch.empty(len(image_3HW), h, w, dtype=image_3HW.dtype, device=image_3HW.device)
            image_3HW[:, top : top + h, left : left + w] = drawn_3hw.normal_(generator=noise)


def erased_box(height: int, width: int, generator: random.Random) -> Box | None:
    """Top, left, height and width of what is erased; None when ten draws do not fit."""
    for _ in range(_TRIES):
        area = generator.uniform(*ERASED) * height * width
        aspect = math.exp(generator.uniform(math.log(ASPECT), -math.log(ASPECT)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            return generator.randint(0, height - h), generator.randint(0, width - w), h, w
    return None


def cut_box(height: int, width: int, share: float, generator: np.random.RandomState) -> Box:
    """Top, left, height and width of a box with the image's shape, of 1 - ``share`` of its area, centred anywhere in it; what
    lies outside of the image is cut off."""
    side = math.sqrt(1 - share)
    h, w = int(height * side), int(width * side)
    y, x = int(generator.randint(height)), int(generator.randint(width))
    top, left = max(0, y - h // 2), max(0, x - w // 2)
    return top, left, min(height, y + (h + 1) // 2) - top, min(width, x + (w + 1) // 2) - left
