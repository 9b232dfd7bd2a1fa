"""Replaces unreadable images during training by substitutes that the sample plan draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import TimeoutError
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scale_mae.config.schema import DataConfig
from scale_mae.data import pillow, storage
from scale_mae.data.crop_boxes import Ints
from scale_mae.data.errors import DataError, ImageError, ImageStatus
from scale_mae.data.failure_counter import DecodeFailure
from scale_mae.data.index import Index
from scale_mae.data.sample_plan import SamplePlan
from scale_mae.system.thread_pool import run_in_new_thread


@dataclass(frozen=True)
class ImageReplacer:
    """Replaces unreadable images. The substitute of a position is the same for every decoder and number of processes.

    Attributes:
        index: The images.
        plan: Draws the substitutes.
        config: The crops of the substitutes.
        image_size: (height, width) in pixels.
    """

    index: Index
    plan: SamplePlan
    config: DataConfig
    image_size: tuple[int, int]

    def fill_batch(
        self, positions: Ints, samples: Ints, decoded: Tensor | None, rows: Sequence[int], errors: Mapping[int, ImageError]
    ) -> tuple[Tensor, list[DecodeFailure]]:
        """Complete a batch in which images are missing.

        Args:
            positions: Positions of the batch in the plan, ``[B]``.
            samples: Rows of the index, ``[B]``. The rows of the substitutes are written into it.
            decoded: The readable images, uint8 ``[b, H, W, 3]``, if there are any.
            rows: Rows of the batch to which ``decoded`` belongs.
            errors: The error of each other row of the batch.

        Returns:
            All images, uint8 ``[B, H, W, 3]`` on the device of ``decoded``, and the failures.

        Raises:
            DataError: An image and all its substitutes are unreadable.
        """
        device = decoded.device if decoded is not None else torch.device("cpu")
        images = torch.empty((len(positions), *self.image_size, 3), dtype=torch.uint8, device=device)
        if decoded is not None:
            images[list(rows)] = decoded
        failures: list[DecodeFailure] = []
        for row, error in sorted(errors.items()):
            samples[row], pixels, new_failures = self._find_substitute(int(positions[row]), int(samples[row]), error)
            images[row] = torch.from_numpy(pixels.copy()).to(device)
            failures += new_failures
        return images, failures

    def _find_substitute(
        self, position: int, sample: int, error: ImageError
    ) -> tuple[int, NDArray[np.uint8], list[DecodeFailure]]:
        """Return the first readable substitute of a position, its pixels, and all failures before it."""
        failures, tried = [], {sample}
        timeout = storage.READ_TIMEOUTS[0]
        for substitute in self.plan.substitutes(position):
            if substitute in tried:
                continue
            tried.add(substitute)
            locations = self.index.location(sample), self.index.location(substitute)
            failures.append(DecodeFailure(position, locations[0], error.cause, error.reason, locations[1]))
            try:
                # in a new thread, because the shard of the substitute may block too
                future = run_in_new_thread(self._decode, position, substitute)
                return substitute, future.result(timeout), failures
            except ImageError as another:
                sample, error = substitute, another
            except TimeoutError:
                sample, error = substitute, ImageError(ImageStatus.UNREADABLE, f"no answer for {timeout:g} s")
        location = failures[0].location if failures else self.index.location(sample)
        raise DataError(f"{location}: {error}. None of {len(failures)} substitutes is readable. Check the storage.")

    def _decode(self, position: int, sample: int) -> NDArray[np.uint8]:
        entry = self.index.entries[sample : sample + 1]
        (crop,) = self.plan.crops(np.array([position]), entry["width"], entry["height"], self.config, self.image_size)
        return pillow.decode(self.index.read(sample), crop, self.image_size)
