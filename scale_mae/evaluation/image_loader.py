"""Images as evaluation sees them: decoded ahead in threads, whole or an error, each once, in any number of processes."""

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
class View:
    """How an encoded image becomes pixels, uint8 ``[side, side, 3]``."""

    side: int
    decode: Callable[[bytes], NDArray[np.uint8]]


def central_view(size: int, crop_pct: float | None) -> View:
    """Scales the short side, cuts out the central square; see :func:`scale_mae.data.pillow.decode_center_crop`."""
    return View(size, lambda data: pillow.decode_center_crop(data, size, crop_pct))


def whole_view(size: int) -> View:
    """The whole central square of the upright image, scaled to ``size`` pixels."""

    def decode(data: bytes) -> NDArray[np.uint8]:
        header = pillow.read_image_header(data, verify=False)
        return pillow.decode(data, pillow.center_square(header.width, header.height), (size, size))

    return View(size, decode)


@dataclass(frozen=True)
class EvaluationImages:
    """Some images.

    Attributes:
        rows: of the index, ``[B]``.
        images: uint8 ``[B, H, W, 3]``.
        content: sum of the images' digests, see :func:`content_of`.
    """

    rows: Sequence[int]
    images: Tensor
    content: int


def content_of(data: bytes, label: int) -> int:
    """A number of 128 bits for the encoded bytes of an image and its label. The sum of these, modulo 2**128, tells which images
    a set has and how often, whatever their order, names and packaging."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=CONTENT_BITS // 8, salt=b"%d" % label).digest(), "little")


def views(index: Index, rows: Sequence[int], view: View, batch: int) -> Iterator[EvaluationImages]:
    """The images of ``rows`` in that order, ``batch`` at a time, read and decoded in threads while the model computes.

    Raises:
        DataError: an image cannot be read or decoded; names it.
    """
    threads = max(1, available_cores() // processes_on_node())
    pool = DaemonThreadPool(threads, "decode")
    labels = index.entries["label"]

    def load(row: int) -> tuple[NDArray[np.uint8], int]:
        try:
            data = index.read(row)
            return view.decode(data), content_of(data, int(labels[row]))
        except ImageError as error:
            raise DataError(f"{index.location(row)}: {error}; it belongs to the set, so nothing is told without it") from None

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
