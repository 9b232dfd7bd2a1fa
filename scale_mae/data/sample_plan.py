"""What comes when: sample order, crop boxes, flips, colour jitter, mask noise and more seeds as pure functions of a position.

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

from scale_mae.config.sections import DataConfig
from scale_mae.data.crop_boxes import NUMBERS, Floats, Ints, clipped_crops, fixed_size_crops, random_resized_crops
from scale_mae.data.pillow import Crop

Words = NDArray[np.uint64]
_ORDER, _CROP, _MASK, _JITTER, _SUBSTITUTE, _AUGMENT, _BATCH = range(7)  # independent random streams
_ROUNDS = 6
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
    skipped: tuple[tuple[int, int], ...] = ()

    def skip(self, first: int, stop: int) -> SamplePlan:
        """The same plan, with positions ``first`` to ``stop - 1`` left out besides."""
        merged: list[tuple[int, int]] = []
        for begin, end in sorted({*self.skipped, (first, stop)}):
            if merged and begin <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(end, merged[-1][1])
            else:
                merged.append((begin, end))
        return replace(self, skipped=tuple(merged))

    def positions(self, step: int, rank: int, world_size: int, micro_step: int, micro_batch: int) -> Ints:
        """Positions of one forward pass of one process: consecutive rows of the step, ``[micro_batch]``, ascending."""
        first = step * self.global_batch + (micro_step * world_size + rank) * micro_batch
        positions = np.arange(first, first + micro_batch)
        for begin, end in self.skipped:
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

        ``random_crop`` is distributed as torchvision's RandomResizedCrop and RandomHorizontalFlip; ``random_crop_once`` is its
        first try, cut to the image; ``fixed_crop`` takes 7/8 of the short side (224 of 256) at a random place; ``none`` the
        same at the centre, never flipped.

        Args:
            positions: ``[n]``, ascending.
            widths: of the upright images in pixels, ``[n]``.
            heights: likewise.
            config: kind of augmentation, scale, ratio and probability of a flip.
            image_size: (height, width) that the box is resized to; gives the shape of boxes that are not random.
        """
        u = self._uniforms(_CROP, positions, NUMBERS + 1)
        if config.augmentation in ("random_crop", "random_crop_jitter"):
            boxes = random_resized_crops(u[:, :-1], widths, heights, config.crop_scale, config.crop_ratio)
        elif config.augmentation == "random_crop_once":
            boxes = clipped_crops(u[:, :-1], widths, heights, config.crop_scale, config.crop_ratio)
        else:
            place = u[:, -3:-1] if config.augmentation == "fixed_crop" else np.full((len(u), 2), 0.5)
            boxes = fixed_size_crops(place, widths, heights, image_size)
        flips = u[:, -1] < (0 if config.augmentation == "none" else config.flip)
        return list(map(Crop._make, zip(*boxes.T.tolist(), flips.tolist(), strict=True)))

    def color_jitter(self, positions: Ints, strength: tuple[float, float, float]) -> NDArray[np.float32]:
        """Colour jitter of each image as torchvision's ColorJitter draws it, ``[n, 6]``: factors of brightness, contrast and
        saturation, uniform in [max(0, 1 - strength), 1 + strength], and a key for each by which their order is sorted."""
        u = self._uniforms(_JITTER, positions, 6)
        low = np.maximum(0, 1 - np.array(strength))
        u[:, :3] = low + u[:, :3] * (1 + np.array(strength) - low)
        return u.astype(np.float32)

    def augment_seeds(self, positions: Ints) -> Words:
        """Two seeds of the random changes of each image, ``[n, 2]``: see :mod:`scale_mae.data.randaugment`."""
        return self._words(_AUGMENT, positions, 2)[:, :2]

    def batch_seed(self, positions: Ints) -> int:
        """A seed, in [0, 2^63), of what is drawn for a forward pass as a whole; it is its first position's."""
        return int(self._words(_BATCH, positions[:1], 1)[0, 0] >> np.uint64(1))

    def mask_noise(self, positions: Ints, num_patches: int) -> NDArray[np.float32]:
        """A uniform number for each patch of each image, ``[n, patches]``: fresh at every position of the run."""
        bits = self._words(_MASK, positions, -(-num_patches // 2)).view(np.uint32)
        bits >>= np.uint32(9)
        bits |= np.uint32(0x3F800000)  # 23 random bits after the exponent of 1: a number in [1, 2)
        noise: NDArray[np.float32] = bits.view(np.float32)[:, :num_patches] - np.float32(1)
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
