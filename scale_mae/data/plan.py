"""What comes when: sample order, crop boxes, flips, colour jitter and mask noise as pure functions of a position.

A run consumes positions 0, 1, 2, ...: row ``r`` of step ``s`` is position ``s * global_batch + r``. Everything random about
a position is computed from (seed, position), so that nothing has to be remembered: resuming needs the step number only, and
splitting a batch over another number of processes changes nothing. An epoch is ``dataset_size`` positions, each a
permutation of the whole data set; a batch may straddle two epochs.

A run that has gone back leaves out the stretches of positions that led it astray: its steps read on past them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from scale_mae.data.pillow import Crop
from scale_mae.sections import DataConfig

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Words = NDArray[np.uint64]
_ORDER, _CROP, _MASK, _JITTER, _SUBSTITUTE = range(5)  # independent random streams
_ROUNDS = 6
_TRIES = 10  # of torchvision's RandomResizedCrop
_FIXED = 0.875  # share of the short side that a fixed-size crop takes: 224 of 256
SUBSTITUTES = 16


@dataclass(frozen=True)
class SamplePlan:
    """Order and augmentation of a whole run.

    Attributes:
        seed: of everything random.
        dataset_size: images of the data set.
        global_batch: images of one optimizer step.
        skips: stretches of positions left out, as (first, one past the last): sorted, apart from each other.
    """

    seed: int
    dataset_size: int
    global_batch: int
    skips: tuple[tuple[int, int], ...] = ()

    def without(self, first: int, stop: int) -> SamplePlan:
        """The same plan, with positions ``first`` to ``stop - 1`` left out besides."""
        merged: list[tuple[int, int]] = []
        for begin, end in sorted({*self.skips, (first, stop)}):
            if merged and begin <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(end, merged[-1][1])
            else:
                merged.append((begin, end))
        return replace(self, skips=tuple(merged))

    def positions(self, step: int, rank: int, ranks: int, micro_step: int, micro_batch: int) -> Ints:
        """Positions of one forward pass of one process: consecutive rows of the step, ``[micro_batch]``, ascending."""
        first = step * self.global_batch + (micro_step * ranks + rank) * micro_batch
        positions = np.arange(first, first + micro_batch)
        for begin, end in self.skips:
            positions += (positions >= begin) * (end - begin)
        return positions

    def samples(self, positions: Ints) -> Ints:
        """Index of the image at each position, ``[n]``."""
        epochs, places = np.divmod(positions, self.dataset_size)
        first, last = int(epochs.min()), int(epochs.max())
        if first == last:
            return self._permute(places, first)
        out = np.empty_like(positions)
        for epoch in range(first, last + 1):
            here = epochs == epoch
            out[here] = self._permute(places[here], epoch)
        return out

    def substitutes(self, position: int) -> list[int]:
        """Images to try, in this order, when the one at a position cannot be decoded."""
        u = self._uniforms(_SUBSTITUTE, np.array([position]), SUBSTITUTES)[0]
        return [int(number) for number in u * self.dataset_size]

    def crops(
        self,
        positions: Ints,
        widths: NDArray[np.integer],
        heights: NDArray[np.integer],
        config: DataConfig,
        image_size: tuple[int, int],
    ) -> list[Crop]:
        """Crop boxes and flips: the augmentations of the paper's table 1e.

        ``random_crop`` is distributed as torchvision's RandomResizedCrop and RandomHorizontalFlip; ``fixed_crop`` takes 7/8
        of the short side (224 of 256) at a random place; ``none`` the same at the centre, never flipped.

        Args:
            positions: ``[n]``, ascending.
            widths: of the upright images in pixels, ``[n]``.
            heights: likewise.
            config: kind of augmentation, scale, ratio and probability of a flip.
            image_size: (height, width) that the box is resized to; gives the shape of boxes that are not random.
        """
        u = self._uniforms(_CROP, positions, 2 * _TRIES + 3)
        if config.augmentation in ("random_crop", "random_crop_jitter"):
            boxes = random_resized_crops(u[:, :-1], widths, heights, config.crop_scale, config.crop_ratio)
        else:
            place = u[:, -3:-1] if config.augmentation == "fixed_crop" else np.full((len(u), 2), 0.5)
            boxes = fixed_size_crops(place, widths, heights, image_size)
        flips = u[:, -1] < (0 if config.augmentation == "none" else config.flip)
        return list(map(Crop._make, zip(*boxes.T.tolist(), flips.tolist(), strict=True)))

    def jitter(self, positions: Ints, strength: tuple[float, float, float]) -> NDArray[np.float32]:
        """Colour jitter of each image as torchvision's ColorJitter draws it, ``[n, 6]``: factors of brightness, contrast and
        saturation, uniform in [max(0, 1 - strength), 1 + strength], and a key for each by which their order is sorted."""
        u = self._uniforms(_JITTER, positions, 6)
        low = np.maximum(0, 1 - np.array(strength))
        u[:, :3] = low + u[:, :3] * (1 + np.array(strength) - low)
        return u.astype(np.float32)

    def mask_noise(self, positions: Ints, patches: int) -> NDArray[np.float32]:
        """A uniform number for each patch of each image, ``[n, patches]``: fresh at every position of the run."""
        bits = self._words(_MASK, positions, -(-patches // 2)).view(np.uint32)
        bits >>= np.uint32(9)
        bits |= np.uint32(0x3F800000)  # 23 random bits after the exponent of 1: a number in [1, 2)
        noise: NDArray[np.float32] = bits.view(np.float32)[:, :patches] - np.float32(1)
        return noise

    def _uniforms(self, stream: int, positions: Ints, count: int) -> Floats:
        """``[n, count]`` numbers in [0, 1)."""
        uniforms: Floats = (self._words(stream, positions, count)[:, :count] >> np.uint64(11)) * 2.0**-53
        return uniforms

    def _words(self, stream: int, positions: Ints, count: int) -> Words:
        """At least ``count`` random words for each of ascending positions, from a counter-based generator (Philox 4x64)."""
        blocks = -(-count // 4)  # the generator yields four words a counter value; every position owns whole ones
        first = int(positions[0])
        if int(positions[-1]) - first >= len(positions):  # a stretch between them is left out
            parts = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
            return np.concatenate([self._words(stream, part, count) for part in parts])
        generator = np.random.Philox(key=[self.seed, stream])
        generator.advance(first * blocks)
        return generator.random_raw(len(positions) * blocks * 4).reshape(len(positions), -1)

    def _permute(self, places: Ints, epoch: int) -> Ints:
        """A keyed permutation of ``range(dataset_size)`` evaluated at ``places``: a Feistel network on pairs (left, right)
        of the smallest near-square that holds the range, applied again to what falls outside it (generalised Feistel
        cipher and cycle walking; Black and Rogaway 2002)."""
        columns = np.uint64(math.isqrt(self.dataset_size - 1) + 1)
        rows = np.uint64(-(-self.dataset_size // int(columns)))
        keys = _round_keys(self.seed, epoch)
        out = places.astype(np.uint64)
        walking = slice(None)
        while True:
            left, right = out[walking] // columns, out[walking] % columns
            for turn in range(0, _ROUNDS, 2):
                left = _add(left, _mix(right ^ keys[turn]), rows)
                right = _add(right, _mix(left ^ keys[turn + 1]), columns)
            out[walking] = left * columns + right
            walking = np.flatnonzero(out >= self.dataset_size)  # type: ignore[assignment]
            if not len(walking):  # type: ignore[arg-type]
                return out.astype(np.int64)


@functools.lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> Words:
    generator = np.random.Philox(key=[seed, _ORDER])
    generator.advance(epoch * _ROUNDS)  # a counter value yields four words, more than the epochs' keys need
    return generator.random_raw(_ROUNDS)


def _mix(x: Words) -> Words:
    """The finaliser of splitmix64 (Steele et al. 2014): every input bit changes every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = x ^ (x >> np.uint64(31))
    return mixed


def _add(x: Words, random: Words, modulus: np.uint64) -> Words:
    """``x`` plus a random number below ``modulus`` (which is below 2^32), modulo ``modulus``."""
    total: Words = x + ((random >> np.uint64(32)) * modulus >> np.uint64(32))
    total -= modulus * (total >= modulus)
    return total


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
        w[again], h[again], fits[again] = _tries(u[again, 2 : 2 * _TRIES], width[again], height[again], scale, ratio)
    boxes[:, 0] = u[:, -2] * (height - h + 1)
    boxes[:, 1] = u[:, -1] * (width - w + 1)
    boxes[:, 2], boxes[:, 3] = h, w
    for i in np.flatnonzero(~fits):  # ten misses: the largest centred box within the allowed ratios
        shape = width[i] / height[i]
        w_i = round(height[i] * ratio[1]) if shape > ratio[1] else width[i]
        h_i = round(width[i] / ratio[0]) if shape < ratio[0] else height[i]
        boxes[i] = (height[i] - h_i) // 2, (width[i] - w_i) // 2, h_i, w_i
    return boxes


def _tries(u: Floats, width: Ints, height: Ints, scale: tuple[float, float], ratio: tuple[float, float]) -> tuple[Ints, ...]:
    """The first box that fits among those which ``u``, ``[n, 2 * tries]``, gives: width, height, whether any did."""
    areas = (width * height)[:, None] * (scale[0] + u[:, 0::2] * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = np.exp(low + u[:, 1::2] * (high - low))
    w = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    h = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    rows, first = np.arange(len(u)), fits.argmax(axis=1)
    return w[rows, first], h[rows, first], fits[rows, first]


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
