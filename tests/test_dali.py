"""Tests that the DALI decoder returns the images of the reference decoder."""

import contextlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline
from PIL import Image, ImageFile

from scale_mae.data import dali, pillow
from scale_mae.data.dali import DaliDecoder, Jpeg, plain_jpeg_header, resize_on_gpu
from scale_mae.data.errors import ImageError, ImageStatus
from scale_mae.data.pillow import EXIF_ORIENTATION, Crop

SIZE = (96, 80)  # not square, so that swapping height and width is noticed
SHAPES = [(375, 501), (500, 333), (9, 17), (1, 1), (2, 2), (300, 3), (64, 64), (300, 90)]
BATCH = len(SHAPES)
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.fixture(scope="module")
def decoder():
    with contextlib.closing(DaliDecoder(SIZE, BATCH, threads=2)) as decoder:
        yield decoder


@pytest.fixture(autouse=True)
def larger_encoder_buffer(monkeypatch):
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 1 << 22)  # Pillow's default buffer is too small for JPEG files of noise


def photo(height, width, rng):
    y, x = np.mgrid[:height, :width]
    waves = [110 * np.sin(x / rng.uniform(5, 60) + y / rng.uniform(5, 60) + rng.uniform(0, 6)) for _ in range(3)]
    blob = 160 * (np.hypot(x - rng.uniform(0, width), y - rng.uniform(0, height)) < 0.3 * width)  # sharp edges, overexposed
    texture = rng.normal(0, 12, (height, width))
    return (np.stack(waves, -1) + (blob + texture)[..., None] + 100).clip(0, 255).astype(np.uint8)


def noise(height, width, rng):
    return rng.integers(0, 256, (height, width, 3), np.uint8)


def jpeg(pixels, orientation=1, mode="RGB", quality=92, **options):
    if orientation > 1:
        options["exif"] = Image.Exif()
        options["exif"][EXIF_ORIENTATION] = orientation
    return encoded(Image.fromarray(pixels).convert(mode), "JPEG", quality=quality, **options)


def encoded(image, form, **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def without_huffman_table(data):
    at = data.index(b"\xff\xc4") + 5
    return data[:at] + b"\xff" * 16 + data[at + 16 :]


def random_crop(data, rng):
    _, _, *shape, _ = full_crop(data)
    height, width = (int(np.ceil(side ** rng.uniform(0, 1))) for side in shape)
    top, left = int(rng.integers(shape[0] - height + 1)), int(rng.integers(shape[1] - width + 1))
    return Crop(top, left, height, width, flip=bool(rng.random() < 0.5))


def full_crop(data):
    width, height, _ = pillow.read_image_header(data, verify=False)
    return Crop(0, 0, height, width, flip=False)


def check_parity(decoder, batch, mean=0.1, maximum=3):
    expected = np.stack([pillow.decode(data, crop, SIZE) for data, crop in batch])
    images, errors = decoder.decode_batch([decoder.prepare_image(data, crop) for data, crop in batch])
    assert (images.dtype, images.shape, errors) == (torch.uint8, expected.shape, {})
    difference = np.abs(images.cpu().numpy().astype(int) - expected)
    assert difference.mean(axis=(1, 2, 3)).max() <= mean
    assert difference.max() <= maximum


def mixed_batch(content, rng, **options):
    return [(data, random_crop(data, rng)) for data in (jpeg(content(*shape, rng), **options) for shape in SHAPES)]


SAMPLINGS = [{"mode": "L"}, *({"subsampling": sampling} for sampling in ("4:4:4", "4:2:2", "4:2:0", "4:1:1"))]
KINDS = [*SAMPLINGS, *({"progressive": True} | kind for kind in SAMPLINGS), {"quality": 30}, {"restart_marker_blocks": 4}]


@pytest.mark.parametrize("content", [photo, noise])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_dali_images_equal_pillow_images(decoder, content, options):
    before, rng = decoder.fallbacks, np.random.default_rng(len(str(options)))
    for _ in range(4):
        check_parity(decoder, mixed_batch(content, rng, **options))
    assert decoder.fallbacks == before


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(decoder, orientation):
    check_parity(decoder, mixed_batch(photo, np.random.default_rng(orientation), orientation=orientation))


def test_orientation_in_xmp_is_applied(decoder):
    data = jpeg(photo(60, 90, np.random.default_rng(0)), xmp=XMP)
    assert plain_jpeg_header(data) == (60, 90, 6)  # upright
    check_parity(decoder, [(data, Crop(20, 5, 50, 40, False))])


def test_resizing_for_gpus_equals_pillow(decoder):
    batch = [pair for o in (1, 6, 8) for pair in mixed_batch(noise, np.random.default_rng(o), orientation=o)]
    planned = [(pair, item) for pair in batch if isinstance(item := decoder.prepare_image(*pair), Jpeg)]
    boxes = []
    for _, item in planned:
        pixels = np.array(Image.open(io.BytesIO(item.data)))
        boxes.append(torch.from_numpy(pixels)[item.start[0] : item.end[0], item.start[1] : item.end[1]])
    images = resize_on_gpu(boxes, [item for _, item in planned], SIZE).numpy()
    assert np.abs(images.astype(int) - np.stack([pillow.decode(*pair, SIZE) for pair, _ in planned])).max() <= 3


def others():
    rng = np.random.default_rng(0)
    pixels = photo(40, 60, rng)
    image = Image.fromarray(pixels)
    grey16 = Image.fromarray(rng.integers(0, 65536, (40, 60), np.uint16))
    return {
        "CMYK": encoded(image.convert("CMYK"), "JPEG"),  # Pillow writes it inverted, as Adobe does
        "RGB-coded": encoded(image, "JPEG", keep_rgb=True),
        "PNG": encoded(image, "PNG"),
        "PNG, 16 bits": encoded(grey16, "PNG"),
        "PNG, palette": encoded(image.quantize(17), "PNG"),
        "PNG, alpha": encoded(image.convert("RGBA"), "PNG"),
        "WebP": encoded(image, "WEBP"),
        "GIF": encoded(image, "GIF"),
        "one pixel": jpeg(pixels[:1, :1]),
        "bytes after the end": jpeg(pixels) + b"\0\0",
    }


@pytest.mark.parametrize("kind", others())
def test_pillow_decodes_everything_but_plain_jpeg(decoder, kind, monkeypatch):
    monkeypatch.setattr(decoder, "_pipeline", None)
    monkeypatch.setattr(decoder, "_build", Mock(side_effect=AssertionError("DALI was asked")))
    before = decoder.fallbacks
    check_parity(decoder, [(others()[kind], full_crop(others()[kind]))] * 3, mean=0, maximum=0)
    assert decoder.fallbacks == before


def test_pillow_decodes_huge_and_strongly_shrunken_images(decoder, monkeypatch):
    data = jpeg(np.zeros((SIZE[0] * dali.MAX_SHRINK + 8, 8, 3), np.uint8))
    assert not isinstance(decoder.prepare_image(data, full_crop(data)), Jpeg)
    assert isinstance(decoder.prepare_image(data, full_crop(data)._replace(height=500)), Jpeg)
    monkeypatch.setattr(dali, "MAX_PIXELS", 4000)
    assert not isinstance(decoder.prepare_image(data, full_crop(data)._replace(height=500)), Jpeg)


def test_errors_equal_those_of_pillow(decoder):
    data, smaller = (jpeg(photo(height, 60, np.random.default_rng(0))) for height in (40, 39))
    cases = [
        (data[:900], ImageStatus.DAMAGED),
        (smaller, ImageStatus.DAMAGED),
        (b"", ImageStatus.EMPTY),
        (b"<" + data, ImageStatus.NOT_AN_IMAGE),
    ]
    for wrong, cause in cases:
        with pytest.raises(ImageError) as caught:
            decoder.prepare_image(wrong, Crop(0, 0, 40, 60, False))
        assert caught.value.cause == cause


def test_damage_inside_a_jpeg_is_filled_in_as_pillow_does(decoder):
    data = jpeg(photo(200, 300, np.random.default_rng(1)))
    head, tail = data[: len(data) // 2], data[len(data) // 2 :]
    for damaged in (head + tail[999:], head + b"\x55" * 99 + tail[99:], head + b"\xff\xd9"):
        check_parity(decoder, [(damaged, full_crop(damaged)), (damaged, Crop(120, 40, 70, 200, True))])


def test_a_damaged_image_does_not_affect_the_rest_of_its_batch(decoder):
    before, rng = decoder.fallbacks, np.random.default_rng(2)
    batch = [(data, full_crop(data)) for data in (jpeg(photo(70, 90, rng)) for _ in range(4))]
    batch[1] = (encoded(Image.fromarray(photo(70, 90, rng)), "PNG"), full_crop(batch[1][0]))
    items = [decoder.prepare_image(*pair) for pair in batch]
    items[2] = items[2]._replace(data=without_huffman_table(items[2].data))
    images, errors = decoder.decode_batch(items)
    assert {row: error.cause for row, error in errors.items()} == {2: ImageStatus.DAMAGED}
    assert decoder.fallbacks == before + 3
    assert decoder.failure
    assert not images[2].any()
    for row in (0, 1, 3):
        assert np.array_equal(images[row].numpy(), pillow.decode(*batch[row], SIZE))
    check_parity(decoder, mixed_batch(photo, rng))  # DALI works again
    assert decoder.fallbacks == before + 3


def test_pillow_decodes_when_dali_always_fails(decoder, monkeypatch):
    failing = Mock(side_effect=RuntimeError("no DALI today"))
    before, rng = decoder.fallbacks, np.random.default_rng(3)
    monkeypatch.setattr(decoder, "_pipeline", None)
    monkeypatch.setattr(decoder, "_build", failing)
    for _ in range(2):
        check_parity(decoder, mixed_batch(photo, rng, orientation=3), mean=0, maximum=0)
    assert decoder.fallbacks > before + BATCH
    assert decoder.failure == "no DALI today"


def test_batches_of_any_length_from_any_thread_keep_their_order(decoder):
    rng = np.random.default_rng(4)
    batch = [(jpeg(photo(40, 60, rng)), Crop(3, 2, 30, 40, True)), (others()["PNG"], Crop(0, 0, 40, 60, False))] * (BATCH // 2)
    assert decoder.decode_batch([])[0].shape == (0, *SIZE, 3)
    for length in range(1, BATCH + 1):
        check_parity(decoder, batch[:length])
        with ThreadPoolExecutor(1) as pool:
            pool.submit(check_parity, decoder, batch[-length:]).result()


def test_no_memory_or_files_leak(decoder):
    def held():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd"))

    rng = np.random.default_rng(5)
    items = [decoder.prepare_image(data, full_crop(data)) for data in (jpeg(photo(160, 200, rng)) for _ in range(4))]
    bad = items[0]._replace(data=without_huffman_table(items[0].data))
    for turn in range(700):
        decoder.decode_batch([*items[: turn % 4], bad] if turn % 25 == 0 else items[: turn % 5])
        if turn == 200:
            before = held()
    mebibytes, files = (now - then for now, then in zip(held(), before, strict=True))
    assert mebibytes < 30
    assert files <= 0


def test_dali_accepts_the_gpu_graph():
    pipeline = Pipeline(BATCH, 2, None, prefetch_queue_depth=1)  # no GPU is needed unless the pipeline is built
    dali.define_graph(pipeline, "mixed")
    graph = pipeline.serialize()
    assert b"decoders__ImageSlice" in graph
    assert b"mixed" in graph


@pytest.mark.gpu
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_gpu_images_equal_pillow_images(options):
    decoder, rng = DaliDecoder(SIZE, BATCH, threads=2, device_id=0), np.random.default_rng(6)
    for orientation in range(1, 9):
        for content in (photo, noise):
            check_parity(decoder, mixed_batch(content, rng, orientation=orientation, **options), mean=0.5, maximum=8)
    assert decoder.fallbacks == 0
    items = [decoder.prepare_image(*pair) for pair in mixed_batch(photo, rng)]
    items[0] = items[0]._replace(data=without_huffman_table(items[0].data))
    images, errors = decoder.decode_batch(items)
    assert images.is_cuda
    assert list(errors) == [0]
    check_parity(decoder, mixed_batch(photo, rng), mean=0.5, maximum=8)  # DALI works again
    decoder.close()
