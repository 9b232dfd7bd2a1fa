"""Photographs for benchmarks of the data path: JPEG files in class folders, of about ImageNet's sizes, bytes and detail.

They are cut at random places and scales from the photographs among KDE's wallpapers (Debian package
``plasma-workspace-wallpapers``). Wallpapers are smoother than what ImageNet was collected from, hence the grain and the
sharpening of a small camera: what an image costs to decode is the number of its coefficients that are not zero.

    python benchmarks/photos.py /tmp/photos --count 2000
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from statistics import mean

import numpy as np
from PIL import Image, ImageFilter

WALLPAPERS = Path("/usr/share/wallpapers")
PHOTOS = ("BytheWater", "EveningGlow", "FallenLeaf", "OneStandsOut", "Path")
SIZES = {(500, 375): 60, (375, 500): 15, (500, 333): 12, (333, 500): 5, (500, 334): 3, (400, 300): 3, (500, 500): 2}
CLASSES = 10
SCALES = (1.5, 3.5)  # pixels of a wallpaper to one of a photograph, along a side
GRAIN = 5.0  # standard deviation, of 255
SHARPEN = ImageFilter.UnsharpMask(radius=1, percent=120, threshold=0)


def make_photos(folder: Path, count: int = 2000, seed: int = 0) -> Path:
    """Write ``count`` JPEG files (quality 92, 4:2:0) into ``folder``/class0 to class9. The same seed gives the same files.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: the wallpapers are not installed; names the Debian package.
    """
    wallpapers = [_largest(name) for name in PHOTOS]
    draw, grain = random.Random(seed), np.random.default_rng(seed)
    for number in range(count):
        photo = _photo(wallpapers[number % len(wallpapers)], draw, grain)
        path = folder / f"class{number % CLASSES}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.save(path, "JPEG", quality=92, subsampling="4:2:0")
    return folder


def _largest(name: str) -> Image.Image:
    files = sorted(WALLPAPERS.glob(f"{name}/contents/images*/*.jpg"))
    if not files:
        raise FileNotFoundError(f"no {name} in {WALLPAPERS}: install the Debian package plasma-workspace-wallpapers")
    images = [Image.open(file) for file in files]
    return max(images, key=lambda image: image.width * image.height).convert("RGB")


def _photo(wallpaper: Image.Image, draw: random.Random, grain: np.random.Generator) -> Image.Image:
    width, height = draw.choices(list(SIZES), list(SIZES.values()))[0]
    scale = min(draw.uniform(*SCALES), wallpaper.width / width, wallpaper.height / height)
    left, top = draw.uniform(0, wallpaper.width - width * scale), draw.uniform(0, wallpaper.height - height * scale)
    box = (left, top, min(left + width * scale, wallpaper.width), min(top + height * scale, wallpaper.height))
    photo = wallpaper.resize((width, height), Image.Resampling.BICUBIC, box=box)
    grainy = np.asarray(photo, np.float32) + GRAIN * grain.standard_normal((height, width, 1), np.float32)
    return Image.fromarray(grainy.round().clip(0, 255).astype(np.uint8)).filter(SHARPEN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = make_photos(options.folder, options.count, options.seed)
    sizes = [file.stat().st_size for file in folder.glob("class*/*.jpg")]
    least, most = min(sizes) / 1000, max(sizes) / 1000
    print(f"{folder}: {len(sizes)} photographs of {mean(sizes) / 1000:.0f} KB on average, {least:.0f} to {most:.0f} KB")


if __name__ == "__main__":
    main()
