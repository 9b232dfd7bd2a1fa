"""Batches ahead of time: a bounded number of micro-batches is read and decoded in threads while the step computes."""

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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scale_mae.config.sections import DataConfig
from scale_mae.data import pillow
from scale_mae.data.crop_boxes import Ints
from scale_mae.data.decoders import Decoder
from scale_mae.data.errors import DataError, ImageError, ImageStatus
from scale_mae.data.failure_counter import DecodeFailure
from scale_mae.data.index import Index
from scale_mae.data.pillow import Crop
from scale_mae.data.randaugment import RandAugment, on_host
from scale_mae.data.sample_plan import SamplePlan
from scale_mae.system.resources import available_cores, available_memory, processes_on_node
from scale_mae.system.thread_pool import DaemonThreadPool

PATIENCE = (30.0, 60.0, 120.0)  # seconds to wait for storage before each further try
ENCODED = 1 << 18  # bytes, a generous guess of an encoded image
PREFETCH = 4


class Batch(NamedTuple):
    """One micro-batch.

    Attributes:
        images: uint8 ``[B, H, W, 3]``.
        noise: for the masks, fp32 ``[B, L]``; None where L is 0.
        jitter: of the colours, fp32 ``[B, 6]``, or None.
        samples: rows of the index, ``[B]``, after any replacement.
        failures: images that had to be replaced.
        seed: in [0, 2^63), of what else is drawn for this forward pass.
    """

    images: Tensor
    mask_noise: Tensor | None
    color_jitter: Tensor | None
    samples: Ints
    failures: Sequence[DecodeFailure]
    seed: int


@dataclass(frozen=True)
class BatchShard:
    """The part of every step that one process computes."""

    rank: int
    world_size: int
    micro_batch: int
    accumulation: int


@dataclass
class _Chunk:
    """Consecutive images of a batch that one thread reads and prepares; a result is None until it is there."""

    samples: Sequence[int]
    crops: Sequence[Crop]
    results: list[Any]


class _Staged(NamedTuple):
    positions: Ints
    samples: Ints
    tasks: Sequence[tuple[_Chunk, Future[None]]]


@dataclass(frozen=True)
class Loader:
    """Decoded micro-batches of one process, in the plan's order. No image can stop it: one that cannot be had is replaced.

    Attributes:
        index: the images.
        plan: their order.
        share: which of them are this process's.
        config: crops, RandAugment, threads, prefetch.
        decoder: see :mod:`scale_mae.data.decoders`.
        image_size: (height, width) in pixels.
        patches: L, for the mask noise; 0 where there are no masks.
        pin_memory: page-locked host memory, for asynchronous copies to a GPU.
        warn: told when storage does not answer.
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
        """Micro-batches of steps ``first_step`` to ``last_step - 1``, ``accumulation`` for each.

        Raises:
            DataError: an image cannot be had and none of its substitutes either.
        """
        threads = num_decoding_threads(self.config)
        ahead = self.config.prefetch or default_prefetch(self.batch_shard.micro_batch, threads, self.image_size)
        # planning has a thread of its own, so that the others never run out of images while a batch is put together
        pool, planner, assembler = (
            DaemonThreadPool(threads, "decode"),
            DaemonThreadPool(1, "plan"),
            DaemonThreadPool(1, "batch"),
        )
        # and so has RandAugment, because storage may keep all the decoding ones waiting
        painters = DaemonThreadPool(threads if self._augment else 0, "augment")
        futures = (
            assembler.submit(self._assemble, planner.submit(self._stage, positions, pool, threads), painters, threads)
            for positions in self._positions(first_step, last_step)
        )
        try:
            pending = deque(islice(futures, ahead))
            while pending:
                batch, changes = pending.popleft().result()
                for change in changes:
                    change.result()
                pending.extend(islice(futures, 1))
                yield batch
        finally:
            for each in (assembler, planner, pool, painters):
                each.shutdown(cancel_futures=True)
            self.decoder.close()

    @functools.cached_property
    def _augment(self) -> RandAugment | None:
        policy = self.config.randaugment
        return RandAugment(policy, self.config.mean) if policy else None

    def _positions(self, first_step: int, last_step: int) -> Iterator[Ints]:
        batch_shard = self.batch_shard
        for step in range(first_step, last_step):
            for micro_step in range(batch_shard.accumulation):
                yield self.plan.positions(step, batch_shard.rank, batch_shard.world_size, micro_step, batch_shard.micro_batch)

    def _stage(self, positions: Ints, pool: DaemonThreadPool, threads: int) -> _Staged:
        samples = self.plan.samples(positions)
        entries = self.index.entries[samples]
        crops = self.plan.crops(positions, entries["width"], entries["height"], self.config, self.image_size)
        size = max(1, len(samples) // (4 * threads))  # a task costs as much as a tiny image
        numbers = samples.tolist()
        starts = range(0, len(numbers), size)
        chunks = [_Chunk(part := numbers[i : i + size], crops[i : i + size], [None] * len(part)) for i in starts]
        return _Staged(positions, samples, [(chunk, pool.submit(self._prepare, chunk)) for chunk in chunks])

    def _prepare(self, chunk: _Chunk) -> None:
        """Fill in what is missing of a chunk. When two threads work on one, they find the same."""
        for place, (sample, crop) in enumerate(zip(chunk.samples, chunk.crops, strict=True)):
            if chunk.results[place] is None:
                try:
                    chunk.results[place] = self.decoder.prepare_image(self.index.read(sample), crop)
                except ImageError as error:
                    chunk.results[place] = error

    def _collect(self, tasks: Sequence[tuple[_Chunk, Future[None]]]) -> list[Any]:
        """The results of a batch's chunks, in order. Where storage does not answer, new threads try again, and in the end the
        images count as unreadable."""
        waiting = list(tasks)
        for patience in PATIENCE:
            deadline = time.monotonic() + patience
            waiting = [(chunk, future) for chunk, future in waiting if not _in_time(future, deadline)]
            for chunk, _ in waiting:
                where = self.index.location(chunk.samples[chunk.results.index(None) if None in chunk.results else -1])
                self.warn(f"{where}: no answer for {patience:g} s, trying again")
            waiting = [(chunk, _in_new_thread(self._prepare, chunk)) for chunk, _ in waiting]
        error = ImageError(ImageStatus.UNREADABLE, f"no answer for {sum(PATIENCE):g} s")
        return [error if result is None else result for chunk, _ in tasks for result in chunk.results]

    def _assemble(self, staged: Future[_Staged], painters: DaemonThreadPool, threads: int) -> tuple[Batch, list[Future[None]]]:
        """A batch, and what has to be done before its images are final."""
        positions, samples, tasks = staged.result()
        prepared = self._collect(tasks)
        rows = [row for row, result in enumerate(prepared) if not isinstance(result, ImageError)]
        errors = {row: result for row, result in enumerate(prepared) if isinstance(result, ImageError)}
        images, late = self.decoder.decode_batch([prepared[row] for row in rows]) if rows else (None, {})
        if self._augment and images is not None and images.is_cuda:
            images = on_host(images)
        errors |= {rows[place]: error for place, error in late.items()}
        failures: list[DecodeFailure] = []
        if errors or images is None:
            images, failures = self._replace(positions, samples, images, rows, errors)
        mask_noise = torch.from_numpy(self.plan.mask_noise(positions, self.num_patches)) if self.num_patches else None
        color_jitter = None
        if self.config.augmentation == "random_crop_jitter":
            color_jitter = torch.from_numpy(self.plan.color_jitter(positions, self.config.color_jitter))
        if self.pin_memory:
            mask_noise, color_jitter = (None if drawn is None else drawn.pin_memory() for drawn in (mask_noise, color_jitter))
            images = images if images.is_cuda else images.pin_memory()
        changes: list[Future[None]] = []
        if self._augment:
            changes = self._augment.start(images, self.plan.augment_seeds(positions), painters, 4 * threads)
        return Batch(images, mask_noise, color_jitter, samples, failures, self.plan.batch_seed(positions)), changes

    def _replace(
        self, positions: Ints, samples: Ints, decoded: Tensor | None, rows: Sequence[int], errors: dict[int, ImageError]
    ) -> tuple[Tensor, list[DecodeFailure]]:
        """All images of a batch in place, ``[B, H, W, 3]``; changes ``samples`` where others stand in."""
        device = decoded.device if decoded is not None else torch.device("cpu")
        images = torch.empty((len(positions), *self.image_size, 3), dtype=torch.uint8, device=device)
        if decoded is not None:
            images[list(rows)] = decoded
        failures: list[DecodeFailure] = []
        for row, error in sorted(errors.items()):
            samples[row], pixels, found = self._substitute(int(positions[row]), int(samples[row]), error)
            images[row] = torch.from_numpy(pixels.copy()).to(device)
            failures += found
        return images, failures

    def _substitute(self, position: int, sample: int, error: ImageError) -> tuple[int, NDArray[np.uint8], list[DecodeFailure]]:
        """The first usable image among the position's substitutes, its pixels, and every failure on the way."""
        failures, tried = [], {sample}
        for substitute in self.plan.substitutes(position):
            if substitute in tried:
                continue
            tried.add(substitute)
            where, instead = self.index.location(sample), self.index.location(substitute)
            failures.append(DecodeFailure(position, where, error.cause, error.reason, instead))
            try:
                # in a thread of its own, because a shard that does not answer may hold the substitute too
                future = _in_new_thread(self._decode_at, position, substitute)
                return substitute, future.result(PATIENCE[0]), failures
            except ImageError as another:
                sample, error = substitute, another
            except TimeoutError:
                sample, error = substitute, ImageError(ImageStatus.UNREADABLE, f"no answer for {PATIENCE[0]:g} s")
        where = failures[0].location if failures else self.index.location(sample)
        raise DataError(f"{where}: {error}, and none of {len(failures)} other images can be used either; check the storage")

    def _decode_at(self, position: int, sample: int) -> NDArray[np.uint8]:
        entry = self.index.entries[sample : sample + 1]
        (crop,) = self.plan.crops(np.array([position]), entry["width"], entry["height"], self.config, self.image_size)
        return pillow.decode(self.index.read(sample), crop, self.image_size)


def _in_time(future: Future[None], deadline: float) -> bool:
    try:
        future.result(max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        return False
    return True


def _in_new_thread(action: Callable[..., Any], *args: Any) -> Future[Any]:
    thread = DaemonThreadPool(1, "retry")  # the pool's threads may all be waiting for storage
    future = thread.submit(action, *args)
    thread.shutdown()
    return future


def num_decoding_threads(config: DataConfig) -> int:
    """Threads that read and decode: as asked for, or this machine's cores shared among its processes."""
    return config.threads or max(1, available_cores() // processes_on_node())


def default_prefetch(micro_batch: int, threads: int, image_size: tuple[int, int]) -> int:
    """Micro-batches to keep in flight: four, more when they are smaller than what the threads work on at once, fewer when
    they would fill more than an eighth of the free memory."""
    wanted = max(PREFETCH, math.ceil(2 * threads / micro_batch))
    bytes_each = micro_batch * (image_size[0] * image_size[1] * 3 + ENCODED)
    return max(1, min(wanted, available_memory() // 8 // processes_on_node() // bytes_each))


def decode_sample(index: Index, sample: int, crop: Crop, image_size: tuple[int, int]) -> NDArray[np.uint8]:
    """One image of an index, ``[H, W, 3]``, where it cannot be replaced by another.

    Raises:
        DataError: it cannot be read or decoded; names it.
    """
    try:
        return pillow.decode(index.read(sample), crop, image_size)
    except ImageError as error:
        raise DataError(f"{index.location(sample)}: {error}; remove it from the data") from None
