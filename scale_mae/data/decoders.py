"""Which decoder: Pillow everywhere, DALI on CPU or GPU. They share one contract and give the same images."""

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
    """Encoded images to pixels, in two stages: one image at a time in many threads, then a batch at a time in one thread.

    Attributes:
        fallbacks: images so far that this decoder should have decoded and Pillow had to.
    """

    fallbacks: int

    def prepare_image(self, data: bytes, crop: Crop) -> Any:
        """First stage of one image.

        Raises:
            ImageError: it cannot be decoded.
        """

    def decode_batch(self, prepared: Sequence[Any]) -> tuple[Tensor, dict[int, ImageError]]:
        """Images, uint8 ``[B, H, W, 3]``, and the rows that could not be decoded after all."""

    def close(self) -> None:
        """Give back threads and memory."""


class PillowDecoder:
    """The reference."""

    def __init__(self, image_size: tuple[int, int]) -> None:
        self._size, self.fallbacks = image_size, 0

    def prepare_image(self, data: bytes, crop: Crop) -> Any:
        """Decode."""
        return pillow.decode(data, crop, self._size)

    def decode_batch(self, prepared: Sequence[Any]) -> tuple[Tensor, dict[int, ImageError]]:
        """Stack."""
        return torch.from_numpy(np.stack(prepared)), {}

    def close(self) -> None:
        """Nothing is held."""


def choose_decoder(wanted: str, device: torch.device) -> tuple[DecoderName, str]:
    """The decoder to use and why.

    Args:
        wanted: ``data.decoder``.
        device: that trains.

    Raises:
        DataError: the one asked for does not work here.
    """
    if wanted == "pillow":
        return "pillow", "as asked for"
    problem = _dali_problem()
    if wanted == "dali_gpu" and device.type != "cuda":
        problem = "there is no GPU"
    if wanted != "auto":
        if problem:
            raise DataError(f"data.decoder={wanted} cannot be used: {problem}; take data.decoder=auto")
        return wanted, "as asked for"  # type: ignore[return-value]
    if problem:
        return "pillow", problem
    return ("dali_gpu", "DALI and a GPU are here") if device.type == "cuda" else ("dali_cpu", "DALI is here, a GPU is not")


def build_decoder(
    name: DecoderName, image_size: tuple[int, int], batch_size: int, threads: int, device: torch.device
) -> Decoder:
    """A decoder for batches of up to ``batch_size`` images of ``image_size`` (height, width).

    Raises:
        DataError: DALI does not start.
    """
    if name == "pillow":
        return PillowDecoder(image_size)
    try:
        from scale_mae.data.dali import DaliDecoder  # only here, so that nobody else needs it installed

        decoder: Decoder = DaliDecoder(image_size, batch_size, threads, device.index or 0 if name == "dali_gpu" else None)
        return decoder
    except (RuntimeError, ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"data.decoder={name} does not start ({reason}); take data.decoder=pillow") from None


def _dali_problem() -> str:
    try:
        import scale_mae.data.dali  # noqa: F401  # the question is whether it works
    except (ImportError, OSError) as error:
        return f"DALI cannot be imported ({' '.join(str(error).split())})"
    return ""
