"""The reference decoder: decodes, crops and resizes images with Pillow. The other decoders return the same pixels."""

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
# a subset of Pillow's formats: some of its other readers start external programs on the file
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
TRANSPOSE = {  # EXIF orientation -> the operation that turns the stored image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow raises an error above 2 * Image.MAX_IMAGE_PIXELS (179 million) and warns above half of that; the error is enough
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Crop(NamedTuple):
    """A box of an upright image in pixels, and whether to flip it horizontally."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


class Header(NamedTuple):
    """Size of the upright image in pixels, and the EXIF orientation (1 to 8) of the stored image."""

    width: int
    height: int
    orientation: int


@contextmanager
def _open_image(data: bytes) -> Iterator[Image.Image]:
    if not data:
        raise ImageError(ImageStatus.EMPTY, "0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(ImageStatus.TOO_LARGE, "not enough free memory") from None
    except UnidentifiedImageError:
        raise ImageError(ImageStatus.NOT_AN_IMAGE, f"the first bytes are {data[:4].hex(' ')}") from None
    except Image.DecompressionBombError as error:
        raise ImageError(ImageStatus.TOO_LARGE, str(error)) from None
    except Exception as error:  # damaged files make Pillow's plugins raise errors of many kinds
        raise ImageError(ImageStatus.DAMAGED, str(error) or type(error).__name__) from error


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(EXIF_ORIENTATION, 1)
    return value if value in TRANSPOSE else 1


def read_image_header(data: bytes, *, verify: bool = False) -> Header:
    """Return size and orientation of an encoded image.

    Args:
        data: The encoded image.
        verify: Also decode the whole image.

    Raises:
        ImageError: NOT_AN_IMAGE, TOO_LARGE, DAMAGED or EMPTY.
    """
    with _open_image(data) as image:
        width, height = image.size
        orientation = _orientation(image)
        if verify:
            _to_rgb(image)
    return Header(height, width, orientation) if orientation >= 5 else Header(width, height, orientation)


def center_square(width: int, height: int) -> Crop:
    """Return the largest centered square of an image."""
    side = min(width, height)
    return Crop((height - side) // 2, (width - side) // 2, side, side, flip=False)


def decode(data: bytes, crop: Crop, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Decode an image, turn it upright, crop it, resize it with antialiased bicubic interpolation, and flip it if required.

    Gray, CMYK, palette and 16-bit images become 8-bit RGB. Transparency is dropped.

    Args:
        data: The encoded image.
        crop: Box in the upright image, and whether to flip.
        size: (height, width) of the result in pixels.

    Returns:
        ``[height, width, 3]`` RGB.

    Raises:
        ImageError: NOT_AN_IMAGE, TOO_LARGE, EMPTY, or DAMAGED, which includes an image smaller than the crop.
    """
    top, left, height, width, flip = crop
    with _open_image(data) as image:
        operation = TRANSPOSE.get(_orientation(image))
        upright = image.transpose(operation) if operation is not None else image
        if top + height > upright.height or left + width > upright.width:
            raise ImageError(
                ImageStatus.DAMAGED, f"{upright.width} x {upright.height} pixels, smaller than when it was indexed"
            )
        part = _to_rgb(upright.crop((left, top, left + width, top + height)))
    part = _resize(part, size)
    return np.asarray(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else part)


def decode_center_crop(data: bytes, side: int, crop_pct: float | None) -> NDArray[np.uint8]:
    """Decode an image as the evaluation of classifiers does: scale the short side, then cut out the central square.

    The pixels equal torchvision's ``Resize(int(side / crop_pct), BICUBIC)`` and ``CenterCrop(side)`` (with Pillow up to 12).
    As in torchvision, the EXIF orientation is ignored, because published results were measured on images as they are stored.

    Args:
        data: The encoded image.
        side: Side of the square in pixels.
        crop_pct: ``side`` as a fraction of the scaled short side. ``None`` disables the scaling.

    Returns:
        ``[side, side, 3]`` RGB.

    Raises:
        ImageError: NOT_AN_IMAGE, TOO_LARGE, EMPTY, or DAMAGED, which includes an image smaller than the square.
    """
    with _open_image(data) as image:
        rgb = _to_rgb(image)
    if crop_pct is not None:
        short, scaled = min(rgb.size), int(side / crop_pct)
        width, height = (scaled if length == short else int(scaled * length / short) for length in rgb.size)
        rgb = _resize(rgb, (height, width))
    if min(rgb.size) < side:
        raise ImageError(ImageStatus.DAMAGED, f"{rgb.width} x {rgb.height} pixels, smaller than the crop of {side} x {side}")
    left, top = (round((length - side) / 2) for length in rgb.size)
    return np.asarray(rgb.crop((left, top, left + side, top + side)))


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to (height, width) with antialiased bicubic interpolation."""
    # Resize along the width first. Pillow 13 and later starts with the height of tall boxes. Values are rounded and clipped
    # in between, so the order changes photographs by up to 20 of 255.
    return image.resize((size[1], image.height), Image.Resampling.BICUBIC).resize((size[1], size[0]), Image.Resampling.BICUBIC)


def reencode_as_jpeg(data: bytes, short_side: int, quality: int) -> bytes:
    """Re-encode an image as an upright 8-bit RGB JPEG with a short side of at most ``short_side`` pixels.

    Raises:
        ImageError: NOT_AN_IMAGE, TOO_LARGE, DAMAGED or EMPTY.
    """
    with _open_image(data) as image:
        operation = TRANSPOSE.get(_orientation(image))
        rgb = _to_rgb(image.transpose(operation) if operation is not None else image)
    scale = short_side / min(rgb.size)
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in rgb.size)
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    rgb.save(out, "JPEG", quality=quality)
    return out.getvalue()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel: Pillow clips these to 8 bits instead of scaling them
        values = np.asarray(image, np.float64).clip(0, 65535) / 257
        return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
