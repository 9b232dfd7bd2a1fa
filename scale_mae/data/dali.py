"""The DALI decoder: DALI decodes, PyTorch resizes. It returns the images of the reference decoder in less time, on CPU or GPU.

DALI decodes plain JPEG files only, and only the box of the crop. Pillow decodes all other images.

PyTorch resizes, not DALI, for three reasons. At the borders of a box, DALI repeats pixels where Pillow ignores them. Pillow
rounds and clips between the two passes, but DALI does not; in overexposed parts of photographs this is a difference of up to
20 of 255. On a CPU, DALI takes seven times as long as PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from struct import unpack_from
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from torch import Tensor
from torch.nn.functional import interpolate

from scale_mae.data import pillow
from scale_mae.data.errors import ImageError
from scale_mae.data.pillow import Crop, Header

MARGIN = 8  # pixels decoded around a box, because chroma upsampling interpolates between neighbors
MAX_SHRINK = 32  # for larger factors, the filter does not fit into PyTorch's GPU kernel
HARDWARE_LOAD = 0.65  # fraction of the images that a GPU with a JPEG engine decodes there; its CUDA cores decode the others
MAX_PIXELS = 1 << 26  # Pillow decodes larger images
PREALLOCATED_SIDE = 1024  # pixels; the JPEG engine allocates memory for this size first, and more when needed
IGNORED_SEGMENTS = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # markers of JPEG segments that do not affect the choice
FRAMES = {0xC0, 0xC1, 0xC2}  # markers of Huffman-coded frames, from baseline to progressive
# EXIF orientation -> transpose first, then reverse the rows, reverse the columns
TURNS = {1: (0, 0, 0), 2: (0, 0, 1), 3: (0, 1, 1), 4: (0, 1, 0), 5: (1, 0, 0), 6: (1, 0, 1), 7: (1, 1, 1), 8: (1, 1, 0)}


class Jpeg(NamedTuple):
    """An image for DALI: the box to decode, and how to get the crop from this box.

    Attributes:
        data: The encoded image.
        crop: The requested crop of the upright image.
        start: First row and column of the box, in the stored image.
        end: The row and column after the last ones of the box.
        rows: Rows of the crop in the decoded box.
        columns: Columns of the crop in the decoded box.
        transpose: Transpose the crop before resizing.
        mirror_rows: Reverse the rows after resizing.
        mirror_columns: Reverse the columns after resizing.
    """

    data: bytes
    crop: Crop
    start: tuple[int, int]
    end: tuple[int, int]
    rows: slice
    columns: slice
    transpose: bool
    mirror_rows: bool
    mirror_columns: bool


class DaliDecoder:
    """Decodes with DALI. :func:`scale_mae.data.pillow.decode` decodes other formats, and images at which DALI fails.

    Many threads may call ``prepare_image`` at the same time, but only one may call ``decode_batch`` and ``close``.

    Args:
        image_size: (height, width) of the results in pixels.
        batch_size: Largest number of images in a batch.
        threads: Number of threads that decode and resize.
        device_id: The GPU that decodes and resizes. ``None`` selects the CPU.

    Attributes:
        fallbacks: Number of images that Pillow decoded after DALI failed.
        failure: The last error message of DALI.

    Raises:
        RuntimeError: DALI does not start.
    """

    def __init__(self, image_size: tuple[int, int], batch_size: int, threads: int, device_id: int | None = None) -> None:
        self._size, self._batch_size, self._threads, self._device_id = image_size, batch_size, threads, device_id
        self._device = torch.device("cpu") if device_id is None else torch.device("cuda", device_id)
        self._stream: Any = None if device_id is None else torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="resize")
        self._pipeline: Pipeline | None = self._build()
        self.fallbacks, self.failure = 0, ""

    def prepare_image(self, data: bytes, crop: Crop) -> NDArray[np.uint8] | Jpeg:
        """Plan the decoding of a plain JPEG file, or decode any other image with Pillow: ``[H, W, 3]``.

        Raises:
            ImageError: See :func:`scale_mae.data.pillow.decode`.
        """
        header = plain_jpeg_header(data)
        if header is None or not self._can_decode(header, crop):
            return pillow.decode(data, crop, self._size)
        return _plan(data, header, crop)

    def decode_batch(self, prepared: Sequence[NDArray[np.uint8] | Jpeg]) -> tuple[Tensor, dict[int, ImageError]]:
        """Decode the planned JPEG files and put all images together.

        Returns:
            Images in the given order, uint8 ``[B, H, W, 3]`` on the device of the decoder, and the errors of unreadable
            images by row. Their rows are zero.
        """
        jpegs = {row: item for row, item in enumerate(prepared) if isinstance(item, Jpeg)}
        with torch.cuda.stream(self._stream):
            images_BHW3, errors = self._decode_jpegs(list(jpegs.values()))
            if len(jpegs) < len(prepared):
                arrays = {row: item for row, item in enumerate(prepared) if not isinstance(item, Jpeg)}
                mixed_BHW3 = images_BHW3.new_zeros(len(prepared), *self._size, 3)
                mixed_BHW3[list(jpegs)] = images_BHW3
                mixed_BHW3[list(arrays)] = torch.from_numpy(np.stack(list(arrays.values()))).to(self._device)
                images_BHW3 = mixed_BHW3
        if self._stream is not None:
            self._stream.synchronize()  # afterwards DALI may reuse its buffers, and other streams may read the images
            images_BHW3.record_stream(torch.cuda.default_stream(self._device))  # training reads them there
        rows = list(jpegs)
        return images_BHW3, {rows[number]: error for number, error in errors.items()}

    def close(self) -> None:
        """Release threads and memory."""
        self._pool.shutdown()
        self._pipeline = None

    def _can_decode(self, header: Header, crop: Crop) -> bool:
        inside = crop.top + crop.height <= header.height and crop.left + crop.width <= header.width
        line = min(crop.height, crop.width) == 1  # PyTorch's resizing handles the strides of single columns incorrectly
        shrink = max(crop.height / self._size[0], crop.width / self._size[1])
        return inside and not line and shrink <= MAX_SHRINK and header.width * header.height <= MAX_PIXELS

    def _build(self) -> Pipeline:
        # no queue: decode_batch returns the images of its own arguments, so there is nothing to prefetch
        pipeline = Pipeline(self._batch_size, self._threads, self._device_id, prefetch_queue_depth=1)
        define_graph(pipeline, "cpu" if self._device_id is None else "mixed")
        pipeline.build()
        return pipeline

    def _decode_jpegs(self, jpegs: list[Jpeg]) -> tuple[Tensor, dict[int, ImageError]]:
        if not jpegs:
            return torch.zeros(0, *self._size, 3, dtype=torch.uint8, device=self._device), {}
        try:
            self._pipeline = self._pipeline or self._build()
            encoded = [np.frombuffer(jpeg.data, np.uint8) for jpeg in jpegs]
            start, end = np.array([jpeg.start for jpeg in jpegs], np.int32), np.array([jpeg.end for jpeg in jpegs], np.int32)
            (boxes,) = self._pipeline.run(encoded=encoded, start=start, end=end)
            return self._resize(boxes, jpegs), {}
        except Exception as error:  # DALI raises errors of many kinds, and does not say which image failed; Pillow does
            self._pipeline = None  # a failed pipeline cannot be used again
            self.failure = str(error)
            self.fallbacks += len(jpegs)
            return self._decode_with_pillow(jpegs)

    def _resize(self, boxes: Any, jpegs: list[Jpeg]) -> Tensor:
        if self._stream is not None:
            return resize_on_gpu([torch.utils.dlpack.from_dlpack(box) for box in boxes], jpegs, self._size)
        arrays = self._pool.map(_resize_on_cpu, map(np.asarray, boxes), jpegs, [self._size] * len(jpegs))
        return torch.from_numpy(np.stack(list(arrays)))

    def _decode_with_pillow(self, jpegs: list[Jpeg]) -> tuple[Tensor, dict[int, ImageError]]:
        images_BHW3 = np.zeros((len(jpegs), *self._size, 3), np.uint8)
        errors = {}
        tasks = [self._pool.submit(pillow.decode, jpeg.data, jpeg.crop, self._size) for jpeg in jpegs]
        for number, task in enumerate(tasks):
            try:
                images_BHW3[number] = task.result()
            except ImageError as error:
                errors[number] = error
        return torch.from_numpy(images_BHW3).to(self._device), errors


def define_graph(pipeline: Pipeline, device: str) -> None:
    """Add the decoder to an empty pipeline: encoded images and boxes are its inputs, decoded boxes its output.

    Args:
        pipeline: A pipeline with an empty graph.
        device: ``cpu``, or ``mixed`` for a decoder that reads host memory and writes GPU memory.
    """
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
        start = fn.external_source(name="start", dtype=types.INT32, ndim=1, no_copy=True)
        end = fn.external_source(name="end", dtype=types.INT32, ndim=1, no_copy=True)
        boxes = fn.decoders.image_slice(
            encoded,
            device=device,
            start=start,
            end=end,
            axis_names="HW",
            output_type=types.RGB,
            adjust_orientation=False,  # DALI reads EXIF only, Pillow also XMP
            jpeg_fancy_upsampling=True,
            hw_decoder_load=HARDWARE_LOAD,
            preallocate_width_hint=PREALLOCATED_SIDE,
            preallocate_height_hint=PREALLOCATED_SIDE,
        )
        pipeline.set_outputs(boxes)


def plain_jpeg_header(data: bytes) -> Header | None:
    """Return size and orientation of a JPEG file that DALI decodes as Pillow does. Return ``None`` for all other data.

    Such a file has 8 bits per channel, is gray or YCbCr, is Huffman coded, and has an end marker. If the data in between is
    damaged, both decoders fill in the same pixels, except for a few images that Pillow rejects.
    """
    if not (data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")):
        return None
    header, tagged, at = None, False, 2
    while at + 20 < len(data):  # less than 20 bytes of each segment are read
        start, marker, length = unpack_from(">BBH", data, at)
        if start == 0xFF and marker in FRAMES and header is None:
            bits, height, width, components = unpack_from(">BHHB", data, at + 4)
            if bits != 8 or not height or not width or components not in (1, 3) or data[at + 10 : at + 17 : 3] == b"RGB":
                return None
            header = Header(width, height, orientation=1)
        elif start == 0xFF and marker == 0xDA:
            return pillow.read_image_header(data) if header and tagged else header
        elif start != 0xFF or marker not in IGNORED_SEGMENTS:
            return None
        tagged |= marker == 0xE1  # EXIF or XMP, which may contain an orientation
        if marker == 0xEE and data[at + 4 : at + 9] == b"Adobe" and data[at + 15] != 1:
            return None  # not YCbCr
        at += 2 + length
    return None


def _plan(data: bytes, header: Header, crop: Crop) -> Jpeg:
    """Find the box of the stored image from which the crop of the upright image comes."""
    transpose, mirror_rows, mirror_columns = map(bool, TURNS[header.orientation])
    rows = _before_mirroring(crop.top, crop.height, header.height, mirror_rows)
    columns = _before_mirroring(crop.left, crop.width, header.width, mirror_columns)
    height, width = header.height, header.width
    if transpose:
        rows, columns, height, width = columns, rows, width, height
    top, left = max(0, rows.start - MARGIN), max(0, columns.start - MARGIN)
    return Jpeg(
        data,
        crop,
        start=(top, left),
        end=(min(height, rows.stop + MARGIN), min(width, columns.stop + MARGIN)),
        rows=slice(rows.start - top, rows.stop - top),
        columns=slice(columns.start - left, columns.stop - left),
        transpose=transpose,
        mirror_rows=mirror_rows,
        mirror_columns=mirror_columns != crop.flip,
    )


def _before_mirroring(first: int, length: int, total: int, mirrored: bool) -> slice:
    first = total - first - length if mirrored else first
    return slice(first, first + length)


def _resize_on_cpu(box_hw3: NDArray[np.uint8], jpeg: Jpeg, size: tuple[int, int]) -> NDArray[np.uint8]:
    # copy with NumPy, because PyTorch would start its own threads in every thread of the pool
    part_hw3 = box_hw3[jpeg.rows, jpeg.columns]
    part_hw3 = np.ascontiguousarray(part_hw3.transpose(1, 0, 2) if jpeg.transpose else part_hw3)
    image_13hw = torch.from_numpy(part_hw3)[None].permute(0, 3, 1, 2)
    image_13HW = interpolate(image_13hw, size, mode="bicubic", antialias=True)  # horizontal pass first, rounded, as in Pillow
    image_HW3: NDArray[np.uint8] = image_13HW[0].permute(1, 2, 0).numpy()
    return image_HW3[:: -1 if jpeg.mirror_rows else 1, :: -1 if jpeg.mirror_columns else 1]


def resize_on_gpu(boxes: Sequence[Tensor], jpegs: Sequence[Jpeg], size: tuple[int, int]) -> Tensor:
    """Crop, resize and turn decoded boxes like :func:`_resize_on_cpu`, with few kernels.

    The arithmetic is floating point, because PyTorch has no uint8 resizing kernel for GPUs.

    Args:
        boxes: Decoded boxes of different sizes, uint8 ``[h, w, 3]``.
        jpegs: The plan of each box.
        size: (height, width) of the results.

    Returns:
        uint8 ``[B, H, W, 3]``.
    """
    images = []
    for box_hw3, jpeg in zip(boxes, jpegs, strict=True):
        part_hw3 = box_hw3[jpeg.rows, jpeg.columns]
        part_3hw = part_hw3.permute(2, 1, 0) if jpeg.transpose else part_hw3.permute(2, 0, 1)
        image_13hw = part_3hw[None].to(torch.float32, memory_format=torch.contiguous_format)
        between = (image_13hw.shape[2], size[1])
        image_13hw = interpolate(image_13hw, between, mode="bicubic", antialias=True).round_().clamp_(0, 255)
        image_13HW = interpolate(image_13hw, size, mode="bicubic", antialias=True)
        turned = [dim for dim, mirror in ((2, jpeg.mirror_rows), (3, jpeg.mirror_columns)) if mirror]
        images.append(image_13HW.flip(turned) if turned else image_13HW)
    return torch.cat(images).round_().clamp_(0, 255).byte().permute(0, 2, 3, 1).contiguous()
