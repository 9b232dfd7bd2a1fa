"""Loads images for evaluation. Threads decode them ahead; an image that cannot be decoded is an error, never a substitute."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scale_mae.data import pillow
from scale_mae.data.errors import DataError, ImageError
from scale_mae.data.index import Index
from scale_mae.system.resources import available_cores, processes_on_node
from scale_mae.system.thread_pool import DaemonThreadPool

AHEAD = 3  # batches
CONTENT_BITS = 128


@dataclass(frozen=True)
class ImageTransform:
    """Turns an encoded image into pixels, uint8 ``[side, side, 3]``."""

    side: int
    decode: Callable[[bytes], NDArray[np.uint8]]


def center_crop_transform(size: int, crop_pct: float | None) -> ImageTransform:
    """Resize the short side and crop the center; see :func:`scale_mae.data.pillow.decode_center_crop`."""
    return ImageTransform(size, lambda data: pillow.decode_center_crop(data, size, crop_pct))


def full_square_transform(size: int) -> ImageTransform:
    """Crop the largest centered square of the upright image and resize it to ``size`` pixels."""

    def decode(data: bytes) -> NDArray[np.uint8]:
        header = pillow.read_image_header(data, verify=False)
        return pillow.decode(data, pillow.center_square(header.width, header.height), (size, size))

    return ImageTransform(size, decode)


@dataclass(frozen=True)
class EvaluationImages:
    """A batch of images.

    Attributes:
        rows: Their rows in the index, ``[B]``.
        images: uint8 pixels ``[B, H, W, 3]``.
        content: The sum of the images' hashes; see :func:`content_hash`.
    """

    rows: Sequence[int]
    images: Tensor
    content: int


def content_hash(data: bytes, label: int) -> int:
    """Return a 128-bit hash of an image's encoded bytes and its label.

    The sum of these hashes modulo 2**128 identifies a set of images. It does not depend on order, file names and packaging.
    """
    return int.from_bytes(hashlib.blake2b(data, digest_size=CONTENT_BITS // 8, salt=b"%d" % label).digest(), "little")


def load_images(index: Index, rows: Sequence[int], view: ImageTransform, batch: int) -> Iterator[EvaluationImages]:
    """Yield the images of ``rows`` in this order, in batches. Threads read and decode them while the model computes.

    Raises:
        DataError: An image cannot be read or decoded; the message names it.
    """
    threads = max(1, available_cores() // processes_on_node())
    pool = DaemonThreadPool(threads, "decode")
    labels = index.entries["label"]

    def load(row: int) -> tuple[NDArray[np.uint8], int]:
        try:
            data = index.read(row)
            return view.decode(data), content_hash(data, int(labels[row]))
        except ImageError as error:
            raise DataError(f"{index.location(row)}: {error}; a score needs every image of the data set") from None

    starts = iter(range(0, len(rows), batch))

    def begin(count: int) -> list[tuple[Sequence[int], list[object]]]:
        parts = [rows[start : start + batch] for start in islice(starts, count)]
        return [(part, [pool.submit(load, int(row)) for row in part]) for part in parts]

    try:
        pending = deque(begin(AHEAD))
        while pending:
            part, futures = pending.popleft()
            loaded = [future.result() for future in futures]  # type: ignore[attr-defined]
            pending.extend(begin(1))
            images = torch.from_numpy(np.stack([pixels for pixels, _ in loaded]))
            yield EvaluationImages(part, images, sum(content for _, content in loaded) % 2**CONTENT_BITS)
    finally:
        pool.shutdown(cancel_futures=True)
