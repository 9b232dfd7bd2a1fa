"""The sample plan: sample order, crop boxes, flips, color jitter, mask noise and seeds as pure functions of a position.

A run consumes the positions 0, 1, 2, ...: row ``r`` of step ``s`` is position ``s * global_batch + r``. Everything random
about a position is computed from (seed, position). A run therefore resumes from its step number alone, and the number of
processes and micro-batches does not change the data. An epoch consists of ``dataset_size`` positions and contains every image
once. A batch may contain the end of one epoch and the start of the next.

After a rollback, a run skips the positions that led to the anomaly. Later steps then read later positions.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from scale_mae.config.schema import DataConfig
from scale_mae.data.crop_boxes import NUM_UNIFORMS, Floats, Ints, clipped_crops, fixed_size_crops, random_resized_crops
from scale_mae.data.pillow import Crop

Words = NDArray[np.uint64]
_ORDER, _CROP, _MASK, _JITTER, _SUBSTITUTE, _AUGMENT, _BATCH = range(7)  # independent random streams
_ROUNDS = 6  # of the Feistel network
NUM_SUBSTITUTES = 16  # per position


@dataclass(frozen=True)
class SamplePlan:
    """Order and augmentation of all images of a run.

    Attributes:
        seed: Determines all random numbers.
        dataset_size: Number of images in the data set.
        global_batch: Images per optimizer step.
        skipped: Skipped ranges of positions, as (first, stop). They are sorted and do not touch.
    """

    seed: int
    dataset_size: int
    global_batch: int
    skipped: tuple[tuple[int, int], ...] = ()

    def skip(self, first: int, stop: int) -> SamplePlan:
        """Return a plan that also skips the positions ``first`` to ``stop - 1``."""
        merged: list[tuple[int, int]] = []
        for begin, end in sorted({*self.skipped, (first, stop)}):
            if merged and begin <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(end, merged[-1][1])
            else:
                merged.append((begin, end))
        return replace(self, skipped=tuple(merged))

    def positions(self, step: int, rank: int, world_size: int, micro_step: int, micro_batch: int) -> Ints:
        """Return the positions of one forward pass of one process, ``[micro_batch]``, ascending."""
        first = step * self.global_batch + (micro_step * world_size + rank) * micro_batch
        positions = np.arange(first, first + micro_batch)
        for begin, end in self.skipped:
            positions += (positions >= begin) * (end - begin)
        return positions

    def samples(self, positions: Ints) -> Ints:
        """Return the row of the index for each position, ``[n]``."""
        epochs, offsets = np.divmod(positions, self.dataset_size)
        first, last = int(epochs.min()), int(epochs.max())
        if first == last:
            return self._permute(offsets, first)
        out = np.empty_like(positions)
        for epoch in range(first, last + 1):
            in_epoch = epochs == epoch
            out[in_epoch] = self._permute(offsets[in_epoch], epoch)
        return out

    def substitutes(self, position: int) -> list[int]:
        """Return the rows of the index to try, in this order, if the image at a position is unreadable."""
        u = self._uniforms(_SUBSTITUTE, np.array([position]), NUM_SUBSTITUTES)[0]
        return [int(number) for number in u * self.dataset_size]

    def crops(
        self,
        positions: Ints,
        widths: NDArray[np.integer],
        heights: NDArray[np.integer],
        config: DataConfig,
        image_size: tuple[int, int],
    ) -> list[Crop]:
        """Return crop boxes and flips. The kinds of augmentation are those of the paper's table 1e.

        ``random_crop`` has the distribution of torchvision's RandomResizedCrop and RandomHorizontalFlip. ``random_crop_once``
        makes one attempt and clips it to the image. ``fixed_crop`` takes 7/8 of the short side (224 of 256) at a random
        location. ``none`` takes the same size at the center and never flips.

        Args:
            positions: ``[n]``, ascending.
            widths: Widths of the upright images in pixels, ``[n]``.
            heights: Heights of the upright images in pixels, ``[n]``.
            config: Kind of augmentation, scale, ratio and probability of a flip.
            image_size: (height, width) to which the box is resized. ``fixed_crop`` and ``none`` use its aspect ratio.
        """
        u = self._uniforms(_CROP, positions, NUM_UNIFORMS + 1)
        if config.augmentation in ("random_crop", "random_crop_jitter"):
            boxes = random_resized_crops(u[:, :-1], widths, heights, config.crop_scale, config.crop_ratio)
        elif config.augmentation == "random_crop_once":
            boxes = clipped_crops(u[:, :-1], widths, heights, config.crop_scale, config.crop_ratio)
        else:
            offsets = u[:, -3:-1] if config.augmentation == "fixed_crop" else np.full((len(u), 2), 0.5)
            boxes = fixed_size_crops(offsets, widths, heights, image_size)
        flips = u[:, -1] < (0 if config.augmentation == "none" else config.flip)
        return list(map(Crop._make, zip(*boxes.T.tolist(), flips.tolist(), strict=True)))

    def color_jitter(self, positions: Ints, strength: tuple[float, float, float]) -> NDArray[np.float32]:
        """Return the color jitter of each image as torchvision's ColorJitter draws it.

        Args:
            positions: ``[n]``, ascending.
            strength: Strength of brightness, contrast and saturation.

        Returns:
            ``[n, 6]``: the three factors, uniform in [max(0, 1 - strength), 1 + strength], and three numbers. Sorting the
            numbers gives the order in which the factors are applied.
        """
        u = self._uniforms(_JITTER, positions, 6)
        low = np.maximum(0, 1 - np.array(strength))
        u[:, :3] = low + u[:, :3] * (1 + np.array(strength) - low)
        return u.astype(np.float32)

    def augment_seeds(self, positions: Ints) -> Words:
        """Return two seeds for each image, ``[n, 2]``, for :mod:`scale_mae.data.randaugment`."""
        return self._words(_AUGMENT, positions, 2)[:, :2]

    def batch_seed(self, positions: Ints) -> int:
        """Return a seed in [0, 2^63) for random numbers of a whole forward pass. It depends on the first position only."""
        return int(self._words(_BATCH, positions[:1], 1)[0, 0] >> np.uint64(1))

    def mask_noise(self, positions: Ints, num_patches: int) -> NDArray[np.float32]:
        """Return a uniform number in [0, 1) for each patch of each image, ``[n, num_patches]``.

        The patches with the smallest numbers stay visible; see :mod:`scale_mae.model.masking`.
        """
        bits = self._words(_MASK, positions, -(-num_patches // 2)).view(np.uint32)
        bits >>= np.uint32(9)
        bits |= np.uint32(0x3F800000)  # 23 random bits of mantissa and the exponent of 1: a number in [1, 2)
        noise: NDArray[np.float32] = bits.view(np.float32)[:, :num_patches] - np.float32(1)
        return noise

    def _uniforms(self, stream: int, positions: Ints, count: int) -> Floats:
        """Return ``[n, count]`` uniform numbers in [0, 1)."""
        uniforms: Floats = (self._words(stream, positions, count)[:, :count] >> np.uint64(11)) * 2.0**-53
        return uniforms

    def _words(self, stream: int, positions: Ints, count: int) -> Words:
        """Return at least ``count`` random words for each position, from a counter-based generator (Philox 4x64).

        The positions must be ascending.
        """
        blocks = -(-count // 4)  # the generator yields four words per counter value; positions do not share a value
        first = int(positions[0])
        if int(positions[-1]) - first >= len(positions):  # a skipped range lies between them
            parts = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
            return np.concatenate([self._words(stream, part, count) for part in parts])
        generator = np.random.Philox(key=[self.seed, stream])
        generator.advance(first * blocks)
        return generator.random_raw(len(positions) * blocks * 4).reshape(len(positions), -1)

    def _permute(self, offsets: Ints, epoch: int) -> Ints:
        """Evaluate a keyed permutation of ``range(dataset_size)`` at ``offsets``, without storing the permutation.

        It is a generalized Feistel cipher with cycle walking (Black and Rogaway 2002). The Feistel network works on pairs
        (left, right) of the smallest near-square that contains the range. It is applied again to results outside the range.
        """
        columns = np.uint64(math.isqrt(self.dataset_size - 1) + 1)
        rows = np.uint64(-(-self.dataset_size // int(columns)))
        keys = _round_keys(self.seed, epoch)
        out = offsets.astype(np.uint64)
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
    generator.advance(epoch * _ROUNDS)  # more than enough: a counter value yields four words
    return generator.random_raw(_ROUNDS)


def _mix(x: Words) -> Words:
    """Apply the finalizer of splitmix64 (Steele et al. 2014): every input bit affects every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = x ^ (x >> np.uint64(31))
    return mixed


def _add(x: Words, random: Words, modulus: np.uint64) -> Words:
    """Add a random number to ``x``, modulo ``modulus``. ``modulus`` is below 2^32."""
    total: Words = x + ((random >> np.uint64(32)) * modulus >> np.uint64(32))
    total -= modulus * (total >= modulus)
    return total
