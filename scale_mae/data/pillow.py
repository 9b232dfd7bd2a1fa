"""How an image is decoded: Pillow, the reference decoder."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

EXIF_ORIENTATION = 0x0112
Image.MAX_IMAGE_PIXELS = 200_000_000  # a decompression bomb becomes an error, a very large photo does not


class Crop(NamedTuple):
    """A box of an upright image in pixels, and whether to mirror it."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except UnidentifiedImageError:
        raise OSError("not an image of a known kind") from None
    except Exception as error:  # damaged files make Pillow's plugins raise whatever their parsers raise
        raise OSError(str(error) or type(error).__name__) from error


def central_square(width: int, height: int) -> Crop:
    """The largest centred square: what evaluation and pictures look at."""
    side = min(width, height)
    return Crop((height - side) // 2, (width - side) // 2, side, side, flip=False)


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) of an encoded image after its EXIF orientation; reads the header only.

    Raises:
        OSError: not an image.
    """
    with _opened(data) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(EXIF_ORIENTATION, 1) >= 5 else (width, height)


def decode(data: bytes, crop: Crop, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Decode, turn upright, crop, resize with antialiased bicubic interpolation, mirror.

    Args:
        data: the encoded image.
        crop: box in the upright image.
        size: (height, width) of the result in pixels.

    Returns:
        ``[height, width, 3]`` RGB.

    Raises:
        OSError: not an image, or a damaged one.
    """
    with _opened(data) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    top, left, height, width, flip = crop
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    if flip:
        image = ImageOps.mirror(image)
    return np.asarray(image)
