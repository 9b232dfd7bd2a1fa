"""JPEG files that cost about as much to decode as ImageNet's, made from noise: no photograph has to be on the machine."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 10
SIZES = ((500, 375), (500, 375), (500, 375), (375, 500), (500, 333))
SCENES = 8
SCENE = (1000, 1000)
OCTAVES = {4: 40.0, 16: 24.0, 64: 16.0, 250: 15.0, 1000: 12.0}  # cells along a side of a scene -> standard deviation, of 255


def make_jpegs(folder: Path, count: int, seed: int = 0) -> None:
    """Write ``count`` JPEG files (quality 92, 4:2:0, about 100 KB) into ``folder``/class0 to class9.

    The same seed gives the same images.
    """
    scenes = [_scene(np.random.default_rng((seed, number))) for number in range(SCENES)]
    for number in range(min(CLASSES, count)):
        (folder / f"class{number}").mkdir(parents=True, exist_ok=True)

    def write(number: int) -> None:
        draw = np.random.default_rng((seed, SCENES, number))
        width, height = SIZES[draw.integers(len(SIZES))]
        left, top = draw.integers(SCENE[0] - width), draw.integers(SCENE[1] - height)
        photograph = scenes[draw.integers(SCENES)].crop((left, top, left + width, top + height))
        photograph.rotate(0 if draw.random() < 0.5 else 180).save(
            folder / f"class{number % CLASSES}" / f"{number:06}.jpg", "JPEG", quality=92, subsampling="4:2:0"
        )

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # Pillow encodes without holding the GIL
        list(pool.map(write, range(count)))


def _scene(draw: np.random.Generator) -> Image.Image:
    """Noise with detail at every scale, from which photographs are cut."""
    pixels = np.full((SCENE[1], SCENE[0], 3), 128.0, np.float32)
    for cells, deviation in OCTAVES.items():
        noise = draw.normal(0.0, deviation, (3, cells, cells)).astype(np.float32)
        channels = [np.asarray(Image.fromarray(channel).resize(SCENE, Image.Resampling.BICUBIC)) for channel in noise]
        pixels += np.stack(channels, axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
