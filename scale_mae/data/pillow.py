"""How an image is decoded: Pillow, the reference decoder."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from scale_mae.data.errors import ImageError, ImageStatus

EXIF_ORIENTATION = 0x0112
# not all that Pillow knows: some of its readers start other programs on what they are given
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
TRANSPOSE = {  # orientation -> what turns the stored image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow refuses images above 2 * Image.MAX_IMAGE_PIXELS (179 million) and warns above half of that; refusing is enough
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Crop(NamedTuple):
    """A box of an upright image in pixels, and whether to mirror it."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


class Header(NamedTuple):
    """Size of the upright image in pixels, and the EXIF orientation (1 to 8) it is stored in."""

    width: int
    height: int
    orientation: int


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    if not data:
        raise ImageError(ImageStatus.EMPTY, "0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(ImageStatus.TOO_LARGE, "more than the memory that is left") from None
    except UnidentifiedImageError:
        raise ImageError(ImageStatus.NOT_AN_IMAGE, f"begins with {data[:4].hex(' ')}") from None
    except Image.DecompressionBombError as error:
        raise ImageError(ImageStatus.TOO_LARGE, str(error)) from None
    except Exception as error:  # damaged files make Pillow's plugins raise whatever their parsers raise
        raise ImageError(ImageStatus.DAMAGED, str(error) or type(error).__name__) from error


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(EXIF_ORIENTATION, 1)
    return value if value in TRANSPOSE else 1


def read_header(data: bytes, verify: bool) -> Header:
    """Size and orientation of an encoded image.

    Args:
        data: the encoded image.
        decode_too: decode all of it and not only its header.

    Raises:
        ImageError: not an image, too large, or damaged.
    """
    with _opened(data) as image:
        width, height = image.size
        orientation = _orientation(image)
        if verify:
            _as_rgb(image)
    return Header(height, width, orientation) if orientation >= 5 else Header(width, height, orientation)


def center_square(width: int, height: int) -> Crop:
    """The largest centred square: what evaluation and pictures look at."""
    side = min(width, height)
    return Crop((height - side) // 2, (width - side) // 2, side, side, flip=False)


def decode(data: bytes, crop: Crop, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Decode, turn upright, crop, resize with antialiased bicubic interpolation, mirror.

    Grey, CMYK, palette and 16-bit images become 8-bit RGB; transparency is dropped.

    Args:
        data: the encoded image.
        crop: box in the upright image.
        size: (height, width) of the result in pixels.

    Returns:
        ``[height, width, 3]`` RGB.

    Raises:
        ImageError: not an image, too large, damaged, or smaller than the crop.
    """
    top, left, height, width, flip = crop
    with _opened(data) as image:
        turn = TRANSPOSE.get(_orientation(image))
        upright = image.transpose(turn) if turn is not None else image
        if top + height > upright.height or left + width > upright.width:
            raise ImageError(
                ImageStatus.DAMAGED, f"{upright.width} x {upright.height} pixels, smaller than when it was indexed"
            )
        part = _as_rgb(upright.crop((left, top, left + width, top + height)))
    part = _resized(part, size)
    return np.asarray(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else part)


def decode_center_crop(data: bytes, side: int, crop_pct: float | None) -> NDArray[np.uint8]:
    """Decode as the evaluation of image classifiers does: scale the short side, cut out the central square.

    The same pixels as torchvision's ``Resize(int(side / crop_pct), BICUBIC)`` and ``CenterCrop(side)`` (with Pillow up to 12).
    As there, an EXIF orientation is not heeded: published figures were measured on images as they are stored.

    Args:
        data: the encoded image.
        side: of the square, in pixels.
        crop_pct: ``side`` as a share of the scaled short side; None: nothing is scaled.

    Returns:
        ``[side, side, 3]`` RGB.

    Raises:
        ImageError: not an image, too large, damaged, or smaller than the square.
    """
    with _opened(data) as image:
        rgb = _as_rgb(image)
    if crop_pct is not None:
        short, wanted = min(rgb.size), int(side / crop_pct)
        width, height = (wanted if length == short else int(wanted * length / short) for length in rgb.size)
        rgb = _resized(rgb, (height, width))
    if min(rgb.size) < side:
        raise ImageError(ImageStatus.DAMAGED, f"{rgb.width} x {rgb.height} pixels, smaller than the {side} x {side} to cut out")
    left, top = (round((length - side) / 2) for length in rgb.size)
    return np.asarray(rgb.crop((left, top, left + side, top + side)))


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resized to (height, width), antialiased and bicubic."""
    # rows first, whatever the version: from 13 on, Pillow on its own begins with the columns of tall boxes, and since values
    # are rounded and clipped in between, that changes photographs by up to 20 of 255
    return image.resize((size[1], image.height), Image.Resampling.BICUBIC).resize((size[1], size[0]), Image.Resampling.BICUBIC)


def reencode_as_jpeg(data: bytes, short_side: int, quality: int) -> bytes:
    """An image again as an upright 8-bit RGB JPEG, its short side at most ``short_side`` pixels.

    Raises:
        ImageError: not an image, too large, or damaged.
    """
    with _opened(data) as image:
        turn = TRANSPOSE.get(_orientation(image))
        rgb = _as_rgb(image.transpose(turn) if turn is not None else image)
    scale = short_side / min(rgb.size)
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in rgb.size)
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    rgb.save(out, "JPEG", quality=quality)
    return out.getvalue()


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow clips to 8 where they have to be scaled
        values = np.asarray(image, np.float64).clip(0, 65535) / 257
        return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
