"""Crop boxes of many images at once, each from a row of uniform numbers."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
TRIES = 10  # of torchvision's RandomResizedCrop
NUMBERS = 2 * TRIES + 2  # that a box may need
REFERENCE_SIDE = (
    224  # the reference scales the short side to 256/224 of the model's side up to this size, and to the side itself above it
)
_FIXED = 0.875  # share of the short side that a fixed-size crop takes: 224 of 256


def random_resized_crops(
    u: Floats,
    widths: NDArray[np.integer],
    heights: NDArray[np.integer],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Ints:
    """Boxes (top, left, height, width) as torchvision's RandomResizedCrop draws them, from given uniform numbers.

    Args:
        u: ``[n, 22]`` in [0, 1): ten tries of (area, aspect ratio), then top and left.
        widths: of the images in pixels, ``[n]``.
        heights: likewise.
        scale: least and largest share of the area.
        ratio: least and largest width / height.

    Returns:
        ``[n, 4]`` integers.
    """
    width, height = widths.astype(np.int64), heights.astype(np.int64)
    boxes = np.empty((len(u), 4), np.int64)
    w, h, fits = _tries(u[:, :2], width, height, scale, ratio)
    again = np.flatnonzero(~fits)  # most first tries fit, so the others are drawn for few
    if len(again):
        w[again], h[again], fits[again] = _tries(u[again, 2 : 2 * TRIES], width[again], height[again], scale, ratio)
    boxes[:, 0] = u[:, -2] * (height - h + 1)
    boxes[:, 1] = u[:, -1] * (width - w + 1)
    boxes[:, 2], boxes[:, 3] = h, w
    for i in np.flatnonzero(~fits):  # ten misses: the largest centred box within the allowed ratios
        shape = width[i] / height[i]
        w_i = round(height[i] * ratio[1]) if shape > ratio[1] else width[i]
        h_i = round(width[i] / ratio[0]) if shape < ratio[0] else height[i]
        boxes[i] = (height[i] - h_i) // 2, (width[i] - w_i) // 2, h_i, w_i
    return boxes


def clipped_crops(
    u: Floats,
    widths: NDArray[np.integer],
    heights: NDArray[np.integer],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Ints:
    """Boxes (top, left, height, width) of random size and shape, cut to the image where they do not fit: one draw, no retry.

    The recipe of BYOL (Grill et al. 2020), with which the paper's linear probes were trained: area and logarithm of the ratio
    are uniform, the cut sides are not.

    Args:
        u: ``[n, 22]`` in [0, 1): as there, of which the first two and the last two are looked at.
        widths: of the images in pixels, ``[n]``.
        heights: likewise.
        scale: least and largest share of the area, before the cut.
        ratio: least and largest width / height, before the cut.

    Returns:
        ``[n, 4]`` integers.
    """
    width, height = widths.astype(np.int64), heights.astype(np.int64)
    w, h = (sides[:, 0] for sides in _shapes(u[:, :2], width, height, scale, ratio))
    w, h = w.clip(1, width), h.clip(1, height)
    top, left = (u[:, -2] * (height - h + 1)).astype(np.int64), (u[:, -1] * (width - w + 1)).astype(np.int64)
    return np.stack([top, left, h, w], axis=1)


def _tries(u: Floats, width: Ints, height: Ints, scale: tuple[float, float], ratio: tuple[float, float]) -> tuple[Ints, ...]:
    """The first box that fits among those which ``u``, ``[n, 2 * tries]``, gives: width, height, whether any did."""
    w, h = _shapes(u, width, height, scale, ratio)
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    rows, first = np.arange(len(u)), fits.argmax(axis=1)
    return w[rows, first], h[rows, first], fits[rows, first]


def _shapes(u: Floats, width: Ints, height: Ints, scale: tuple[float, float], ratio: tuple[float, float]) -> tuple[Ints, Ints]:
    """Widths and heights, ``[n, tries]``, of areas and ratios from ``u``, ``[n, 2 * tries]``."""
    areas = (width * height)[:, None] * (scale[0] + u[:, 0::2] * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = np.exp(low + u[:, 1::2] * (high - low))
    return np.rint(np.sqrt(areas * ratios)).astype(np.int64), np.rint(np.sqrt(areas / ratios)).astype(np.int64)


def fixed_size_crops(
    place: Floats, widths: NDArray[np.integer], heights: NDArray[np.integer], image_size: tuple[int, int]
) -> Ints:
    """Boxes (top, left, height, width) with the shape of the result, 7/8 of the largest that fits.

    Args:
        place: ``[n, 2]`` in [0, 1]: vertical and horizontal place, 0.5 is the centre.
        widths: of the images in pixels, ``[n]``.
        heights: likewise.
        image_size: (height, width) whose shape the boxes have.

    Returns:
        ``[n, 4]`` integers.
    """
    sizes = np.stack([heights, widths], axis=1).astype(np.int64)
    share = _FIXED * (sizes / np.array(image_size)).min(axis=1, keepdims=True)
    box = np.rint(share * np.array(image_size)).astype(np.int64).clip(1, sizes)
    corner = np.minimum((place * (sizes - box + 1)).astype(np.int64), sizes - box)
    return np.concatenate([corner, box], axis=1)


def reference_crop_pct(size: int) -> float:
    """The share of the scaled short side that the reference's evaluation cuts out for a model of ``size`` pixels."""
    return 224 / 256 if size <= REFERENCE_SIDE else 1.0
