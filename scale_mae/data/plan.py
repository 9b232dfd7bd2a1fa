"""What comes when: sample order, crop boxes, flips and mask noise as pure functions of a position.

A run consumes positions 0, 1, 2, ...: row ``r`` of step ``s`` is position ``s * global_batch + r``. Everything random about
a position is computed from (seed, position), so that nothing has to be remembered: resuming needs the step number only, and
splitting a batch over another number of processes changes nothing. An epoch is ``dataset_size`` positions, each a
permutation of the whole data set; a batch may straddle two epochs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scale_mae.data.pillow import Crop

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_ORDER, _CROP, _MASK = range(3)  # independent random streams
_ROUNDS = 6
_TRIES = 10  # of torchvision's RandomResizedCrop


@dataclass(frozen=True)
class SamplePlan:
    """Order and augmentation of a whole run.

    Attributes:
        seed: of everything random.
        dataset_size: images of the data set.
        global_batch: images of one optimizer step.
    """

    seed: int
    dataset_size: int
    global_batch: int

    def positions(self, step: int, rank: int, ranks: int, micro_step: int, micro_batch: int) -> Ints:
        """Positions of one forward pass of one process: a contiguous stretch of the step's rows, ``[micro_batch]``."""
        first = step * self.global_batch + (micro_step * ranks + rank) * micro_batch
        return np.arange(first, first + micro_batch)

    def samples(self, positions: Ints) -> Ints:
        """Index of the image at each position, ``[n]``."""
        epochs, places = np.divmod(positions, self.dataset_size)
        out = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = self._permute(places[here], int(epoch))
        return out

    def crops(
        self,
        positions: Ints,
        widths: NDArray[np.integer],
        heights: NDArray[np.integer],
        *,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        flip: float,
    ) -> list[Crop]:
        """Crop boxes and flips, distributed as torchvision's RandomResizedCrop and RandomHorizontalFlip.

        Args:
            positions: ``[n]``, contiguous.
            widths: of the upright images in pixels, ``[n]``.
            heights: likewise.
            scale: least and largest share of the area.
            ratio: least and largest width / height.
            flip: probability of mirroring.
        """
        u = self._uniforms(_CROP, positions, 2 * _TRIES + 3)
        boxes = random_resized_crops(u[:, :-1], widths, heights, scale, ratio)
        flips = u[:, -1] < flip
        return [Crop(top, left, h, w, mirror) for (top, left, h, w), mirror in zip(boxes.tolist(), flips.tolist(), strict=True)]

    def mask_noise(self, positions: Ints, patches: int) -> NDArray[np.float32]:
        """A uniform number for each patch of each image, ``[n, patches]``: fresh at every position of the run."""
        return self._uniforms(_MASK, positions, patches).astype(np.float32)

    def _uniforms(self, stream: int, positions: Ints, count: int) -> Floats:
        """``[n, count]`` numbers in [0, 1) for contiguous positions, from a counter-based generator (Philox 4x64)."""
        blocks = -(-count // 4)  # the generator yields four numbers a counter value; every position owns whole ones
        generator = np.random.Philox(key=[self.seed, stream])
        generator.advance(int(positions[0]) * blocks)
        raw = generator.random_raw(len(positions) * blocks * 4).reshape(len(positions), -1)[:, :count]
        uniforms: Floats = (raw >> np.uint64(11)) * 2.0**-53
        return uniforms

    def _permute(self, places: Ints, epoch: int) -> Ints:
        """A keyed permutation of ``range(dataset_size)`` evaluated at ``places``: a Feistel network over the next even
        number of bits, applied again wherever it leaves the range (cycle walking; Black and Rogaway 2002)."""
        half = np.uint64(max(1, -(-(self.dataset_size - 1).bit_length() // 2)))
        mask = (np.uint64(1) << half) - np.uint64(1)
        generator = np.random.Philox(key=[self.seed, _ORDER])
        generator.advance(epoch * _ROUNDS)  # a counter value yields four numbers, more than the epochs' keys need
        keys = generator.random_raw(_ROUNDS)
        out = places.astype(np.uint64)
        outside = np.ones(len(out), bool)
        while outside.any():
            x = out[outside]
            left, right = x >> half, x & mask
            for key in keys:
                left, right = right, left ^ (_mix(right ^ key) & mask)
            out[outside] = (left << half) | right
            outside = out >= self.dataset_size
        return out.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014): every input bit changes every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


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
    width, height = widths.astype(np.int64)[:, None], heights.astype(np.int64)[:, None]
    areas = width * height * (scale[0] + u[:, 0 : 2 * _TRIES : 2] * (scale[1] - scale[0]))
    low, high = np.log(ratio)
    ratios = np.exp(low + u[:, 1 : 2 * _TRIES : 2] * (high - low))
    w = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    h = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(axis=1)[:, None]
    w, h = np.take_along_axis(w, first, 1)[:, 0], np.take_along_axis(h, first, 1)[:, 0]
    width, height = width[:, 0], height[:, 0]
    top = np.floor(u[:, -2] * (height - h + 1)).astype(np.int64)
    left = np.floor(u[:, -1] * (width - w + 1)).astype(np.int64)

    # ten misses: the largest centred box within the allowed ratios
    shape = width / height
    central_w = np.where(shape > ratio[1], np.rint(height * ratio[1]), width).astype(np.int64)
    central_h = np.where(shape < ratio[0], np.rint(width / ratio[0]), height).astype(np.int64)
    central = np.stack([(height - central_h) // 2, (width - central_w) // 2, central_h, central_w], axis=1)
    return np.where(fits.any(axis=1)[:, None], np.stack([top, left, h, w], axis=1), central)
