"""Batches ahead of time: a bounded number of micro-batches is decoded in threads while the step computes."""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scale_mae.config import DataConfig
from scale_mae.data.index import DataError, Index
from scale_mae.data.pillow import Crop, decode
from scale_mae.data.plan import Ints, SamplePlan


class Batch(NamedTuple):
    """``images`` uint8 ``[B, H, W, 3]``; ``noise`` fp32 ``[B, L]``; ``samples`` ``[B]`` positions in the index."""

    images: Tensor
    noise: Tensor
    samples: Ints


@dataclass(frozen=True)
class Share:
    """The part of every step that one process computes."""

    rank: int
    ranks: int
    micro_batch: int
    accumulation: int


@dataclass(frozen=True)
class Loader:
    """Decoded micro-batches of one process, in the plan's order.

    Attributes:
        index: the images.
        plan: their order.
        share: which of them are this process's.
        config: crops, threads, prefetch.
        image_size: (height, width) in pixels.
        patches: L, for the mask noise.
        pin_memory: page-locked host memory, for asynchronous copies to a GPU.
    """

    index: Index
    plan: SamplePlan
    share: Share
    config: DataConfig
    image_size: tuple[int, int]
    patches: int
    pin_memory: bool = False

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Micro-batches of steps ``first_step`` to ``last_step - 1``, ``accumulation`` for each.

        Raises:
            DataError: an image cannot be read or decoded; names it.
        """
        every = (
            self.plan.positions(step, self.share.rank, self.share.ranks, micro_step, self.share.micro_batch)
            for step in range(first_step, last_step)
            for micro_step in range(self.share.accumulation)
        )
        threads = self.config.threads or max(1, available_cores() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        try:
            pending = deque(self._submit(pool, p) for p in islice(every, self.config.prefetch))
            while pending:
                positions, samples, futures = pending.popleft()
                images = torch.from_numpy(np.stack([future.result() for future in futures]))
                noise = torch.from_numpy(self.plan.mask_noise(positions, self.patches))
                pending.extend(self._submit(pool, p) for p in islice(every, 1))
                if self.pin_memory:
                    images, noise = images.pin_memory(), noise.pin_memory()
                yield Batch(images, noise, samples)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, positions: Ints) -> tuple[Ints, Ints, list[Future[NDArray[np.uint8]]]]:
        samples = self.plan.samples(positions)
        entries = self.index.entries[samples]
        crops = self.plan.crops(
            positions,
            entries["width"],
            entries["height"],
            scale=self.config.crop_scale,
            ratio=self.config.crop_ratio,
            flip=self.config.flip,
        )
        return positions, samples, [pool.submit(self._decode, *pair) for pair in zip(samples.tolist(), crops, strict=True)]

    def _decode(self, sample: int, crop: Crop) -> NDArray[np.uint8]:
        return decode_sample(self.index, sample, crop, self.image_size)


def decode_sample(index: Index, sample: int, crop: Crop, image_size: tuple[int, int]) -> NDArray[np.uint8]:
    """One image of an index, ``[H, W, 3]``.

    Raises:
        DataError: it cannot be read or decoded; names it.
    """
    data = index.read(sample)
    try:
        return decode(data, crop, image_size)
    except OSError as error:
        raise DataError(f"{index.where(sample)}: cannot be decoded ({error}); remove it from the data") from None


def normalise(images_BHW3: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """uint8 ``[B, H, W, 3]`` to normalised fp32 ``[B, 3, H, W]``, on the tensor's device."""
    mean_1311, std_1311 = _statistics(mean, std, images_BHW3.device)
    return (images_BHW3.permute(0, 3, 1, 2).float() / 255 - mean_1311) / std_1311


def denormalise(images_B3HW: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """Inverse of :func:`normalise` up to rounding: values in [0, 1], clipped, ``[B, 3, H, W]``."""
    mean_1311, std_1311 = _statistics(mean, std, images_B3HW.device)
    return (images_B3HW * std_1311 + mean_1311).clamp(0, 1)


@functools.lru_cache
def _statistics(
    mean: tuple[float, float, float], std: tuple[float, float, float], device: torch.device
) -> tuple[Tensor, Tensor]:
    # made once, because copying them to a GPU waits for it
    return torch.tensor(mean, device=device).view(1, 3, 1, 1), torch.tensor(std, device=device).view(1, 3, 1, 1)


def available_cores() -> int:
    """Cores this process may run on (a Slurm or container limit counts)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
