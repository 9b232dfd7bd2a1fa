"""Makes photographs for the data-loading benchmarks: JPEG files in class folders, similar to ImageNet in size and detail.

They are random crops of the photographs among KDE's wallpapers (Debian package ``plasma-workspace-wallpapers``). Wallpapers are
smoother than the photographs of ImageNet. So grain and sharpening are added, because the time to decode an image depends on the
number of its coefficients that are not zero.

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
SCALES = (1.5, 3.5)  # pixels of a wallpaper per pixel of a photograph, along a side
GRAIN = 5.0  # standard deviation, on the scale of 0 to 255
SHARPEN = ImageFilter.UnsharpMask(radius=1, percent=120, threshold=0)


def make_photos(folder: Path, count: int = 2000, seed: int = 0) -> Path:
    """Write JPEG files (quality 92, 4:2:0) to the folders ``class0`` to ``class9``. The same seed yields the same files.

    Args:
        folder: The folder.
        count: Number of files.
        seed: Seed of the crops and of the grain.

    Returns:
        ``folder``.

    Raises:
        FileNotFoundError: The wallpapers are not installed. The message names the Debian package.
    """
    wallpapers = [_load_wallpaper(name) for name in PHOTOS]
    draw, grain = random.Random(seed), np.random.default_rng(seed)
    for number in range(count):
        photo = _make_photo(wallpapers[number % len(wallpapers)], draw, grain)
        path = folder / f"class{number % CLASSES}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.save(path, "JPEG", quality=92, subsampling="4:2:0")
    return folder


def _load_wallpaper(name: str) -> Image.Image:
    """Load the largest version of a wallpaper."""
    files = sorted(WALLPAPERS.glob(f"{name}/contents/images*/*.jpg"))
    if not files:
        raise FileNotFoundError(f"{WALLPAPERS}/{name}: not found. Install the Debian package plasma-workspace-wallpapers.")
    images = [Image.open(file) for file in files]
    return max(images, key=lambda image: image.width * image.height).convert("RGB")


def _make_photo(wallpaper: Image.Image, draw: random.Random, grain: np.random.Generator) -> Image.Image:
    """Cut a photograph from a wallpaper at a random position and scale."""
    width, height = draw.choices(list(SIZES), list(SIZES.values()))[0]
    scale = min(draw.uniform(*SCALES), wallpaper.width / width, wallpaper.height / height)
    left, top = draw.uniform(0, wallpaper.width - width * scale), draw.uniform(0, wallpaper.height - height * scale)
    box = (left, top, min(left + width * scale, wallpaper.width), min(top + height * scale, wallpaper.height))
    photo = wallpaper.resize((width, height), Image.Resampling.BICUBIC, box=box)
    grainy = np.asarray(photo, np.float32) + GRAIN * grain.standard_normal((height, width, 1), np.float32)
    return Image.fromarray(grainy.round().clip(0, 255).astype(np.uint8)).filter(SHARPEN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--count", type=int, default=2000, help="number of photographs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of crops and grain (default: %(default)s)")
    options = parser.parse_args()
    folder = make_photos(options.folder, options.count, options.seed)
    sizes = [file.stat().st_size for file in folder.glob("class*/*.jpg")]
    smallest, largest = min(sizes) / 1000, max(sizes) / 1000
    print(f"{folder}: {len(sizes)} photographs of {smallest:.0f} to {largest:.0f} KB, {mean(sizes) / 1000:.0f} KB on average")


if __name__ == "__main__":
    main()
