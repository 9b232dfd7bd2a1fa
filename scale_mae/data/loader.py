"""Loads batches ahead of time: threads read and decode a bounded number of micro-batches while the step computes."""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scale_mae.config.schema import DataConfig
from scale_mae.data import storage
from scale_mae.data.crop_boxes import Ints
from scale_mae.data.decoders import Decoder
from scale_mae.data.errors import ImageError, ImageStatus
from scale_mae.data.failure_counter import DecodeFailure
from scale_mae.data.index import Index
from scale_mae.data.pillow import Crop
from scale_mae.data.randaugment import RandAugment, copy_to_pinned_memory
from scale_mae.data.sample_plan import SamplePlan
from scale_mae.data.unreadable_images import ImageReplacer
from scale_mae.system.resources import available_cores, available_memory, processes_on_node
from scale_mae.system.thread_pool import DaemonThreadPool, run_in_new_thread

ENCODED_BYTES = 1 << 18  # a generous estimate for one encoded image
DEFAULT_PREFETCH = 4


class Batch(NamedTuple):
    """One micro-batch.

    Attributes:
        images: uint8 ``[B, H, W, 3]``.
        mask_noise: fp32 ``[B, L]``, or ``None`` for a model without masks.
        color_jitter: fp32 ``[B, 6]``, or ``None`` without color jitter.
        samples: Rows of the index, ``[B]``, after replacement of unreadable images.
        failures: The unreadable images.
        seed: In [0, 2^63), for the other random numbers of this forward pass.
    """

    images: Tensor
    mask_noise: Tensor | None
    color_jitter: Tensor | None
    samples: Ints
    failures: Sequence[DecodeFailure]
    seed: int


@dataclass(frozen=True)
class BatchShard:
    """The part of every step that one process computes.

    Attributes:
        rank: Rank of the process.
        world_size: Number of processes.
        micro_batch: Images per forward pass.
        accumulation: Forward passes per step.
    """

    rank: int
    world_size: int
    micro_batch: int
    accumulation: int


@dataclass
class _Chunk:
    """Consecutive images of a batch that one thread reads and prepares. A result is ``None`` until it is ready."""

    samples: Sequence[int]
    crops: Sequence[Crop]
    results: list[Any]


class _PlannedBatch(NamedTuple):
    positions: Ints
    samples: Ints
    tasks: Sequence[tuple[_Chunk, Future[None]]]


@dataclass(frozen=True)
class Loader:
    """Loads the micro-batches of one process in the order of the plan. Unreadable images are replaced by others.

    Attributes:
        index: The images.
        plan: Their order and augmentation.
        batch_shard: The part of every step that this process computes.
        config: Crops, RandAugment, threads, prefetch.
        decoder: See :mod:`scale_mae.data.decoders`.
        image_size: (height, width) in pixels.
        num_patches: L, for the mask noise; 0 for a model without masks.
        pin_memory: Use page-locked host memory, for asynchronous copies to a GPU.
        warn: Called with a message when the storage does not answer.
    """

    index: Index
    plan: SamplePlan
    batch_shard: BatchShard
    config: DataConfig
    decoder: Decoder
    image_size: tuple[int, int]
    num_patches: int
    pin_memory: bool = False
    warn: Callable[[str], None] = print

    def batches(self, first_step: int, last_step: int) -> Generator[Batch, None, None]:
        """Yield the micro-batches of steps ``first_step`` to ``last_step - 1``, ``accumulation`` for each step.

        Raises:
            DataError: An image and all its substitutes are unreadable.
        """
        threads = num_decoding_threads(self.config)
        prefetch = self.config.prefetch or default_prefetch(self.batch_shard.micro_batch, threads, self.image_size)
        decode_pool = DaemonThreadPool(threads, "decode")
        # Planning has its own thread, so that the decoding threads have work while a batch is assembled. RandAugment has its
        # own threads, because the storage may block all decoding threads.
        plan_pool, assemble_pool = DaemonThreadPool(1, "plan"), DaemonThreadPool(1, "batch")
        augment_pool = DaemonThreadPool(threads if self._augment else 0, "augment")
        futures = (
            assemble_pool.submit(
                self._assemble, plan_pool.submit(self._plan_batch, positions, decode_pool, threads), augment_pool, threads
            )
            for positions in self._positions(first_step, last_step)
        )
        try:
            pending = deque(islice(futures, prefetch))
            while pending:
                batch, augmentations = pending.popleft().result()
                for augmentation in augmentations:
                    augmentation.result()
                pending.extend(islice(futures, 1))
                yield batch
        finally:
            for pool in (assemble_pool, plan_pool, decode_pool, augment_pool):
                pool.shutdown(cancel_futures=True)
            self.decoder.close()

    @functools.cached_property
    def _augment(self) -> RandAugment | None:
        policy = self.config.randaugment
        return RandAugment(policy, self.config.mean) if policy else None

    def _positions(self, first_step: int, last_step: int) -> Iterator[Ints]:
        shard = self.batch_shard
        for step in range(first_step, last_step):
            for micro_step in range(shard.accumulation):
                yield self.plan.positions(step, shard.rank, shard.world_size, micro_step, shard.micro_batch)

    def _plan_batch(self, positions: Ints, decode_pool: DaemonThreadPool, threads: int) -> _PlannedBatch:
        """Look up samples and crops of a batch, and start to decode them."""
        samples = self.plan.samples(positions)
        entries = self.index.entries[samples]
        crops = self.plan.crops(positions, entries["width"], entries["height"], self.config, self.image_size)
        size = max(1, len(samples) // (4 * threads))  # a task costs as much as decoding a tiny image
        numbers = samples.tolist()
        starts = range(0, len(numbers), size)
        chunks = [_Chunk(part := numbers[i : i + size], crops[i : i + size], [None] * len(part)) for i in starts]
        return _PlannedBatch(positions, samples, [(chunk, decode_pool.submit(self._prepare, chunk)) for chunk in chunks])

    def _prepare(self, chunk: _Chunk) -> None:
        """Fill in the missing results of a chunk. Two threads may work on the same chunk: they compute the same results."""
        for number, (sample, crop) in enumerate(zip(chunk.samples, chunk.crops, strict=True)):
            if chunk.results[number] is None:
                try:
                    chunk.results[number] = self.decoder.prepare_image(self.index.read(sample), crop)
                except ImageError as error:
                    chunk.results[number] = error

    def _collect(self, tasks: Sequence[tuple[_Chunk, Future[None]]]) -> list[Any]:
        """Return the results of the chunks of a batch in order.

        When the storage does not answer, new threads try again. After the last timeout the images count as unreadable.
        """
        waiting = list(tasks)
        for timeout in storage.READ_TIMEOUTS:
            deadline = time.monotonic() + timeout
            waiting = [(chunk, future) for chunk, future in waiting if not _done_before(deadline, future)]
            for chunk, _ in waiting:
                missing = chunk.results.index(None) if None in chunk.results else -1
                location = self.index.location(chunk.samples[missing])
                self.warn(f"{location}: the storage has not answered for {timeout:g} s. Trying again.")
            waiting = [(chunk, run_in_new_thread(self._prepare, chunk)) for chunk, _ in waiting]
        error = ImageError(ImageStatus.UNREADABLE, f"no answer for {sum(storage.READ_TIMEOUTS):g} s")
        return [error if result is None else result for chunk, _ in tasks for result in chunk.results]

    def _assemble(
        self, planned: Future[_PlannedBatch], augment_pool: DaemonThreadPool, threads: int
    ) -> tuple[Batch, list[Future[None]]]:
        """Return a batch, and the augmentations that must end before its images are final."""
        positions, samples, tasks = planned.result()
        prepared = self._collect(tasks)
        rows = [row for row, result in enumerate(prepared) if not isinstance(result, ImageError)]
        errors = {row: result for row, result in enumerate(prepared) if isinstance(result, ImageError)}
        images, late_errors = self.decoder.decode_batch([prepared[row] for row in rows]) if rows else (None, {})
        if self._augment and images is not None and images.is_cuda:
            images = copy_to_pinned_memory(images)
        errors |= {rows[number]: error for number, error in late_errors.items()}
        failures: list[DecodeFailure] = []
        if errors or images is None:
            replacer = ImageReplacer(self.index, self.plan, self.config, self.image_size)
            images, failures = replacer.fill_batch(positions, samples, images, rows, errors)
        mask_noise = torch.from_numpy(self.plan.mask_noise(positions, self.num_patches)) if self.num_patches else None
        color_jitter = None
        if self.config.augmentation == "random_crop_jitter":
            color_jitter = torch.from_numpy(self.plan.color_jitter(positions, self.config.color_jitter))
        if self.pin_memory:
            mask_noise, color_jitter = (drawn if drawn is None else drawn.pin_memory() for drawn in (mask_noise, color_jitter))
            images = images if images.is_cuda else images.pin_memory()
        augmentations: list[Future[None]] = []
        if self._augment:
            augmentations = self._augment.start(images, self.plan.augment_seeds(positions), augment_pool, 4 * threads)
        return Batch(images, mask_noise, color_jitter, samples, failures, self.plan.batch_seed(positions)), augmentations


def _done_before(deadline: float, future: Future[None]) -> bool:
    try:
        future.result(max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        return False
    return True


def num_decoding_threads(config: DataConfig) -> int:
    """Return ``data.threads``. By default the processes of a node share its cores equally."""
    return config.threads or max(1, available_cores() // processes_on_node())


def default_prefetch(micro_batch: int, threads: int, image_size: tuple[int, int]) -> int:
    """Return the number of micro-batches to load ahead.

    It is four; more if four contain fewer images than the threads can work on; fewer if they fill more than an eighth of the
    free memory.
    """
    wanted = max(DEFAULT_PREFETCH, math.ceil(2 * threads / micro_batch))
    bytes_each = micro_batch * (image_size[0] * image_size[1] * 3 + ENCODED_BYTES)
    return max(1, min(wanted, available_memory() // 8 // processes_on_node() // bytes_each))
