"""Packs the demo images from Debian's package dataset-fashion-mnist (Fashion-MNIST, Xiao et al. 2017, MIT license).

    python -m scale_mae.demo_data.pack_fashion_mnist [FOLDER]

The shards contain the first 1,000 training images and the first 200 test images of each class, in the original order. Images
are grayscale JPEG files of quality 90, in tar shards of 2,500 images in WebDataset format (``key.jpg``, ``key.cls``). The
shards are compressed, because tar pads each file to blocks of 512 bytes: 7 MB of JPEG data would take 28 MB. The output depends
only on the package and on Pillow's encoder.
"""

from __future__ import annotations

import gzip
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ORIGINALS = Path("/usr/share/datasets/fashion-mnist")
SPLITS = {"train": ("train", 1000), "val": ("t10k", 200)}
PER_SHARD = 2500


def read_idx(path: Path, header: int) -> NDArray[np.uint8]:
    """Return the bytes of an IDX file after its header."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def pack_shards(folder: Path, originals: Path = ORIGINALS) -> None:
    """Write ``train-0000.tar.gz`` ... and ``val-0000.tar.gz`` to ``folder``.

    Raises:
        FileNotFoundError: The Debian package is not installed.
    """
    for split, (name, per_class) in SPLITS.items():
        images = read_idx(originals / f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        labels = read_idx(originals / f"{name}-labels-idx1-ubyte.gz", 8)
        chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(10)]))
        for shard, start in enumerate(range(0, len(chosen), PER_SHARD)):
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for i in chosen[start : start + PER_SHARD]:
                    jpeg = io.BytesIO()
                    Image.fromarray(images[i]).save(jpeg, "JPEG", quality=90, optimize=True)
                    for suffix, content in (("jpg", jpeg.getvalue()), ("cls", b"%d" % labels[i])):
                        member = tarfile.TarInfo(f"{split}-{i:05d}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
            path = folder / f"{split}-{shard:04d}.tar.gz"
            path.write_bytes(gzip.compress(packed.getvalue(), compresslevel=9, mtime=0))


if __name__ == "__main__":
    pack_shards(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
