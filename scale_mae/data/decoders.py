"""The interface of decoders, and the choice of one: Pillow everywhere, DALI on the CPU or GPU. All return the same images.

To add a decoder, implement :class:`Decoder` and add it to :data:`DecoderName`, :func:`choose_decoder` and
:func:`build_decoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from scale_mae.data import pillow
from scale_mae.data.errors import DataError, ImageError
from scale_mae.data.pillow import Crop

DecoderName = Literal["pillow", "dali_cpu", "dali_gpu"]


class Decoder(Protocol):
    """Turns encoded images into pixels in two stages: single images in many threads, then batches in one thread.

    Attributes:
        fallbacks: Number of images that Pillow had to decode after this decoder failed.
    """

    fallbacks: int

    def prepare_image(self, data: bytes, crop: Crop) -> Any:
        """Run the first stage on one image.

        Raises:
            ImageError: The image is unreadable.
        """

    def decode_batch(self, prepared: Sequence[Any]) -> tuple[Tensor, dict[int, ImageError]]:
        """Run the second stage on the results of the first one.

        Returns:
            Images, uint8 ``[B, H, W, 3]``, and the errors of unreadable images by row.
        """

    def close(self) -> None:
        """Release threads and memory."""


class PillowDecoder:
    """The reference decoder. It decodes in the first stage and stacks in the second one."""

    def __init__(self, image_size: tuple[int, int]) -> None:
        self._size, self.fallbacks = image_size, 0

    def prepare_image(self, data: bytes, crop: Crop) -> Any:
        """Decode one image."""
        return pillow.decode(data, crop, self._size)

    def decode_batch(self, prepared: Sequence[Any]) -> tuple[Tensor, dict[int, ImageError]]:
        """Stack the images."""
        return torch.from_numpy(np.stack(prepared)), {}

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def choose_decoder(requested: str, device: torch.device) -> tuple[DecoderName, str]:
    """Choose the decoder and give the reason.

    Args:
        requested: ``data.decoder``.
        device: The device that trains.

    Raises:
        DataError: The requested decoder does not work on this machine.
    """
    if requested == "pillow":
        return "pillow", "as configured"
    problem = _dali_problem()
    if requested == "dali_gpu" and device.type != "cuda":
        problem = "there is no GPU"
    if requested != "auto":
        if problem:
            raise DataError(f"data.decoder={requested}: not available, because {problem}. Set data.decoder=auto.")
        return requested, "as configured"  # type: ignore[return-value]
    if problem:
        return "pillow", problem
    if device.type == "cuda":
        return "dali_gpu", "DALI and a GPU are available"
    return "dali_cpu", "DALI is available, a GPU is not"


def build_decoder(
    name: DecoderName, image_size: tuple[int, int], batch_size: int, threads: int, device: torch.device
) -> Decoder:
    """Build a decoder.

    Args:
        name: The kind of decoder.
        image_size: (height, width) of the results in pixels.
        batch_size: Largest number of images in a batch.
        threads: Number of threads that the decoder itself uses.
        device: The device that trains.

    Raises:
        DataError: DALI does not start.
    """
    if name == "pillow":
        return PillowDecoder(image_size)
    try:
        from scale_mae.data.dali import DaliDecoder  # imported here, because only this decoder needs DALI installed

        decoder: Decoder = DaliDecoder(image_size, batch_size, threads, device.index or 0 if name == "dali_gpu" else None)
        return decoder
    except (RuntimeError, ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"data.decoder={name}: does not start ({reason}). Set data.decoder=pillow.") from None


def _dali_problem() -> str:
    """Return why DALI cannot be imported, or an empty string."""
    try:
        import scale_mae.data.dali  # noqa: F401  # only to find out whether it works
    except (ImportError, OSError) as error:
        return f"DALI cannot be imported ({' '.join(str(error).split())})"
    return ""
