"""Computes crop boxes for many images at once, from uniform random numbers that are given as arguments.

The sample plan draws these numbers and chooses the kind of crop: :meth:`scale_mae.data.sample_plan.SamplePlan.crops`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
ATTEMPTS = 10  # of torchvision's RandomResizedCrop
NUM_UNIFORMS = 2 * ATTEMPTS + 2  # random numbers per box
REFERENCE_SIDE = 224  # pixels; for larger images the reference's evaluation cuts off no border, see reference_crop_pct
_FIXED_FRACTION = 0.875  # of the short side, for a crop of fixed size: 224 of 256


def random_resized_crops(
    u: Floats,
    widths: NDArray[np.integer],
    heights: NDArray[np.integer],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Ints:
    """Compute the boxes of torchvision's RandomResizedCrop.

    Args:
        u: ``[n, 22]`` in [0, 1): ten attempts of (area, aspect ratio), then top and left.
        widths: Widths of the images in pixels, ``[n]``.
        heights: Heights of the images in pixels, ``[n]``.
        scale: Smallest and largest fraction of the area.
        ratio: Smallest and largest width / height.

    Returns:
        Boxes (top, left, height, width), ``[n, 4]``.
    """
    width, height = widths.astype(np.int64), heights.astype(np.int64)
    boxes = np.empty((len(u), 4), np.int64)
    w, h, fits = _first_fit(u[:, :2], width, height, scale, ratio)
    again = np.flatnonzero(~fits)  # most first attempts fit, so few boxes need the other attempts
    if len(again):
        w[again], h[again], fits[again] = _first_fit(u[again, 2 : 2 * ATTEMPTS], width[again], height[again], scale, ratio)
    boxes[:, 0] = u[:, -2] * (height - h + 1)
    boxes[:, 1] = u[:, -1] * (width - w + 1)
    boxes[:, 2], boxes[:, 3] = h, w
    for i in np.flatnonzero(~fits):  # no attempt fits: take the largest centered box within the allowed ratios
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
    """Compute boxes of random size and shape with one attempt. A box that does not fit is clipped to the image.

    This is the crop of BYOL (Grill et al. 2020), with which the paper's linear probes were trained. Area and logarithm of the
    ratio are uniform before the clipping.

    Args:
        u: ``[n, 22]`` in [0, 1), as in :func:`random_resized_crops`. Only the first two and the last two are used.
        widths: Widths of the images in pixels, ``[n]``.
        heights: Heights of the images in pixels, ``[n]``.
        scale: Smallest and largest fraction of the area, before the clipping.
        ratio: Smallest and largest width / height, before the clipping.

    Returns:
        Boxes (top, left, height, width), ``[n, 4]``.
    """
    width, height = widths.astype(np.int64), heights.astype(np.int64)
    w, h = (sides[:, 0] for sides in _sides(u[:, :2], width, height, scale, ratio))
    w, h = w.clip(1, width), h.clip(1, height)
    top, left = (u[:, -2] * (height - h + 1)).astype(np.int64), (u[:, -1] * (width - w + 1)).astype(np.int64)
    return np.stack([top, left, h, w], axis=1)


def _first_fit(
    u: Floats, width: Ints, height: Ints, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Ints, ...]:
    """Return width and height of the first attempt that fits, and whether one does. ``u`` is ``[n, 2 * attempts]``."""
    w, h = _sides(u, width, height, scale, ratio)
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    rows, first = np.arange(len(u)), fits.argmax(axis=1)
    return w[rows, first], h[rows, first], fits[rows, first]


def _sides(u: Floats, width: Ints, height: Ints, scale: tuple[float, float], ratio: tuple[float, float]) -> tuple[Ints, Ints]:
    """Return widths and heights, ``[n, attempts]``, of the areas and ratios drawn by ``u``, ``[n, 2 * attempts]``."""
    areas = (width * height)[:, None] * (scale[0] + u[:, 0::2] * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = np.exp(low + u[:, 1::2] * (high - low))
    return np.rint(np.sqrt(areas * ratios)).astype(np.int64), np.rint(np.sqrt(areas / ratios)).astype(np.int64)


def fixed_size_crops(
    offsets: Floats, widths: NDArray[np.integer], heights: NDArray[np.integer], image_size: tuple[int, int]
) -> Ints:
    """Compute boxes with the aspect ratio of the result and 7/8 of the largest size that fits.

    Args:
        offsets: Vertical and horizontal offset in [0, 1], ``[n, 2]``; 0.5 is the center.
        widths: Widths of the images in pixels, ``[n]``.
        heights: Heights of the images in pixels, ``[n]``.
        image_size: (height, width) of the result, for the aspect ratio.

    Returns:
        Boxes (top, left, height, width), ``[n, 4]``.
    """
    sizes = np.stack([heights, widths], axis=1).astype(np.int64)
    scale = _FIXED_FRACTION * (sizes / np.array(image_size)).min(axis=1, keepdims=True)
    box = np.rint(scale * np.array(image_size)).astype(np.int64).clip(1, sizes)
    corner = np.minimum((offsets * (sizes - box + 1)).astype(np.int64), sizes - box)
    return np.concatenate([corner, box], axis=1)


def reference_crop_pct(size: int) -> float:
    """Return timm's ``crop_pct`` of the reference's evaluation: the fraction of the scaled short side that is cut out.

    Args:
        size: Image size of the model in pixels.
    """
    return 224 / 256 if size <= REFERENCE_SIDE else 1.0
