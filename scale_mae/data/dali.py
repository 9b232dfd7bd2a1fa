"""DALI decodes, PyTorch resizes: the same images as the reference decoder's, in less time, on a CPU or a GPU.

DALI gets plain JPEG only, and of each image only the box that is wanted. It does not resize: at the borders of a box its
filters repeat pixels where Pillow's leave them out, it does not round and clip between the two passes as Pillow does (up to
20 levels of difference in photographs with blown-out lights), and on a CPU it takes seven times as long as PyTorch.
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

MARGIN = 8  # pixels decoded around a box: chroma is interpolated from its neighbours, also at the border of the box
MAX_SHRINK = 32  # beyond, the filter does not fit into what a GPU kernel of PyTorch holds
HARDWARE_SHARE = 0.65  # of the images that GPUs with a JPEG engine decode there; the others keep their CUDA cores busy
MAX_PIXELS = 1 << 26  # larger ones are Pillow's, which may refuse them
USUAL_SIDE = 1024  # pixels; the JPEG engine's memory begins with this and grows
SKIPPED = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # JPEG segments that say nothing about which decoder can take it
FRAMES = {0xC0, 0xC1, 0xC2}  # Huffman coded, baseline to progressive
# orientation -> transposed first, then rows in reverse, columns in reverse
TURNS = {1: (0, 0, 0), 2: (0, 0, 1), 3: (0, 1, 1), 4: (0, 1, 0), 5: (1, 0, 0), 6: (1, 0, 1), 7: (1, 1, 1), 8: (1, 1, 0)}


class Jpeg(NamedTuple):
    """An image for DALI: which box to decode, and what makes the wanted part of it.

    Attributes:
        data: the encoded image.
        crop: as asked for.
        start, end: row and column of the box to decode, in the stored image.
        rows, columns: the crop in the decoded box.
        transpose: the crop is to be transposed before it is resized,
        mirror_rows, mirror_columns: and mirrored after.
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
    """Decodes as :func:`scale_mae.data.pillow.decode` does; what DALI does not take or fails at, with that.

    ``prepare_image`` may be called from many threads at once, ``decode_batch`` and ``close`` from one at a time.

    Args:
        image_size: (height, width) of the results in pixels.
        batch_size: images that ``decode_batch`` gets at most.
        threads: that decode and resize.
        device_id: the GPU that decodes and resizes; None for the CPU.

    Attributes:
        fallbacks: images so far that DALI was asked for and Pillow had to decode.
        failure: what DALI said the last time.

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
        """First stage of one image: what DALI is to decode, or the image ``[H, W, 3]`` where Pillow has to.

        Raises:
            ImageError: not an image, too large, damaged, or smaller than the crop.
        """
        header = plain_jpeg(data)
        if header is None or not self._suits(header, crop):
            return pillow.decode(data, crop, self._size)
        return _planned(data, header, crop)

    def decode_batch(self, prepared: Sequence[NDArray[np.uint8] | Jpeg]) -> tuple[Tensor, dict[int, ImageError]]:
        """Second stage of a batch.

        Returns:
            uint8 ``[B, H, W, 3]`` on the decoder's device, in the given order, and the rows that could not be decoded after
            all, which are zero.
        """
        jpegs = {row: item for row, item in enumerate(prepared) if isinstance(item, Jpeg)}
        with torch.cuda.stream(self._stream):
            images_BHW3, errors = self._decoded(list(jpegs.values()))
            if len(jpegs) < len(prepared):
                arrays = {row: item for row, item in enumerate(prepared) if not isinstance(item, Jpeg)}
                mixed_BHW3 = images_BHW3.new_zeros(len(prepared), *self._size, 3)
                mixed_BHW3[list(jpegs)] = images_BHW3
                mixed_BHW3[list(arrays)] = torch.from_numpy(np.stack(list(arrays.values()))).to(self._device)
                images_BHW3 = mixed_BHW3
        if self._stream is not None:
            self._stream.synchronize()  # DALI may overwrite what was read, and the images are complete for every stream
            images_BHW3.record_stream(torch.cuda.default_stream(self._device))  # where training reads them
        rows = list(jpegs)
        return images_BHW3, {rows[number]: error for number, error in errors.items()}

    def close(self) -> None:
        """Give back threads and memory."""
        self._pool.shutdown()
        self._pipeline = None

    def _suits(self, header: Header, crop: Crop) -> bool:
        inside = crop.top + crop.height <= header.height and crop.left + crop.width <= header.width
        line = min(crop.height, crop.width) == 1  # PyTorch's resizing gets the strides of single columns wrong
        shrink = max(crop.height / self._size[0], crop.width / self._size[1])
        return inside and not line and shrink <= MAX_SHRINK and header.width * header.height <= MAX_PIXELS

    def _build(self) -> Pipeline:
        # a batch at a time, because finish returns what it was given: there is nothing to prefetch
        pipeline = Pipeline(self._batch_size, self._threads, self._device_id, prefetch_queue_depth=1)
        define_graph(pipeline, "cpu" if self._device_id is None else "mixed")
        pipeline.build()
        return pipeline

    def _decoded(self, jpegs: list[Jpeg]) -> tuple[Tensor, dict[int, ImageError]]:
        if not jpegs:
            return torch.zeros(0, *self._size, 3, dtype=torch.uint8, device=self._device), {}
        try:
            self._pipeline = self._pipeline or self._build()
            encoded = [np.frombuffer(jpeg.data, np.uint8) for jpeg in jpegs]
            start, end = np.array([jpeg.start for jpeg in jpegs], np.int32), np.array([jpeg.end for jpeg in jpegs], np.int32)
            (boxes,) = self._pipeline.run(encoded=encoded, start=start, end=end)
            return self._resized(boxes, jpegs), {}
        except Exception as error:  # whatever DALI raises, because of one image or all of them; Pillow says which and why
            self._pipeline = None  # it is of no more use
            self.failure = str(error)
            self.fallbacks += len(jpegs)
            return self._with_pillow(jpegs)

    def _resized(self, boxes: Any, jpegs: list[Jpeg]) -> Tensor:
        if self._stream is not None:
            return resized_on_gpu([torch.utils.dlpack.from_dlpack(box) for box in boxes], jpegs, self._size)
        arrays = self._pool.map(_resized, map(np.asarray, boxes), jpegs, [self._size] * len(jpegs))
        return torch.from_numpy(np.stack(list(arrays)))

    def _with_pillow(self, jpegs: list[Jpeg]) -> tuple[Tensor, dict[int, ImageError]]:
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
    """Add the decoder to an empty pipeline: encoded images and the boxes to decode go in, the boxes come out.

    Args:
        pipeline: whose graph is empty.
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
            adjust_orientation=False,  # it reads EXIF only; Pillow also reads XMP
            jpeg_fancy_upsampling=True,
            hw_decoder_load=HARDWARE_SHARE,
            preallocate_width_hint=USUAL_SIDE,
            preallocate_height_hint=USUAL_SIDE,
        )
        pipeline.set_outputs(boxes)


def plain_jpeg(data: bytes) -> Header | None:
    """Size and orientation of a JPEG that DALI decodes as Pillow does, from its header; None for everything else.

    8 bits, grey or YCbCr, Huffman coded, with an end. Damage between header and end is filled in alike by both, except that
    DALI takes a few images that Pillow refuses.
    """
    if not (data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")):
        return None
    header, tagged, at = None, False, 2
    while at + 20 < len(data):  # longer than what is read of any segment
        start, marker, length = unpack_from(">BBH", data, at)
        if start == 0xFF and marker in FRAMES and header is None:
            bits, height, width, components = unpack_from(">BHHB", data, at + 4)
            if bits != 8 or not height or not width or components not in (1, 3) or data[at + 10 : at + 17 : 3] == b"RGB":
                return None
            header = Header(width, height, orientation=1)
        elif start == 0xFF and marker == 0xDA:
            return pillow.read_image_header(data, verify=False) if header and tagged else header
        elif start != 0xFF or marker not in SKIPPED:
            return None
        tagged |= marker == 0xE1  # EXIF or XMP, which may tell an orientation
        if marker == 0xEE and data[at + 4 : at + 9] == b"Adobe" and data[at + 15] != 1:
            return None  # not YCbCr
        at += 2 + length
    return None


def _planned(data: bytes, header: Header, crop: Crop) -> Jpeg:
    transpose, mirror_rows, mirror_columns = map(bool, TURNS[header.orientation])
    rows = _undone(crop.top, crop.height, header.height, mirror_rows)
    columns = _undone(crop.left, crop.width, header.width, mirror_columns)
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


def _undone(first: int, length: int, total: int, mirrored: bool) -> slice:
    first = total - first - length if mirrored else first
    return slice(first, first + length)


def _resized(box_hw3: NDArray[np.uint8], jpeg: Jpeg, size: tuple[int, int]) -> NDArray[np.uint8]:
    # NumPy copies, because PyTorch would start threads of its own in each of the pool's
    part_hw3 = box_hw3[jpeg.rows, jpeg.columns]
    part_hw3 = np.ascontiguousarray(part_hw3.transpose(1, 0, 2) if jpeg.transpose else part_hw3)
    image_13hw = torch.from_numpy(part_hw3)[None].permute(0, 3, 1, 2)
    image_13HW = interpolate(image_13hw, size, mode="bicubic", antialias=True)  # rows first, and rounds, as Pillow
    image_HW3: NDArray[np.uint8] = image_13HW[0].permute(1, 2, 0).numpy()
    return image_HW3[:: -1 if jpeg.mirror_rows else 1, :: -1 if jpeg.mirror_columns else 1]


def resized_on_gpu(boxes: Sequence[Tensor], jpegs: Sequence[Jpeg], size: tuple[int, int]) -> Tensor:
    """What :func:`_resized` does, with few kernels and in floating point because there are none for uint8.

    Args:
        boxes: as decoded, uint8 ``[h, w, 3]``, each of its own size.
        jpegs: what is wanted of them.
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
