"""How soon is the first batch ready, with an index and with torchvision's ImageFolder? How fast does a large index open?

python benchmarks/start.py --out benchmarks/results/start_cpu_NAME.json

Writes 200,000 small JPEG files to 1,000 class folders. Then it times, in turns, the start until the first batch of 64
images: with ImageFolder and DataLoader, which list every folder first, and with the index. All files are in the page cache.
On a shared file system, where listing is much slower, the index has a larger advantage. The times do not include writing
the files and building the index. The table shows separately how long it takes to build the index once. It also shows how
long it takes to open an index of 14 million images.
"""

from __future__ import annotations

import argparse
import io
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from batches import MEAN, STD
from loader import reference_transform
from PIL import Image
from report import save
from torchvision import datasets

from scale_mae.config.schema import DataConfig
from scale_mae.data.decoders import PillowDecoder
from scale_mae.data.index import ENTRY_DTYPE, Index, ShardPaths, write_index
from scale_mae.data.index_builder import build_index
from scale_mae.data.loader import BatchShard, Loader
from scale_mae.data.sample_plan import SamplePlan
from scale_mae.data.transforms import normalize

CLASSES, BATCH, SIZE = 1000, 64, (64, 64)
OPEN = """
import sys, time, psutil
from scale_mae.data.index import Index
memory = psutil.Process().memory_full_info
before, start = memory().uss, time.perf_counter()
index = Index.open(sys.argv[1])
index.location(len(index) // 2)
print(time.perf_counter() - start, memory().uss - before)
"""


def make_files(root: Path, count: int) -> None:
    """Write ``count`` small JPEG files to class folders."""
    images = []
    for seed in range(100):
        pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).resize((72, 64)).save(out, "JPEG")
        images.append(out.getvalue())
    for c in range(CLASSES):
        folder = root / f"n{c:08d}"
        folder.mkdir(parents=True)
        for i in range(count // CLASSES):
            (folder / f"n{c:08d}_{i:05d}.JPEG").write_bytes(images[(c + i) % 100])


def load_with_image_folder(root: Path) -> None:
    """Load the first batch with ImageFolder."""
    data = datasets.ImageFolder(str(root), reference_transform(SIZE))
    next(iter(torch.utils.data.DataLoader(data, BATCH, shuffle=True, num_workers=2)))


def load_with_index(path: Path) -> None:
    """Load the first batch with an index."""
    index = Index.open(path)
    plan = SamplePlan(0, len(index), BATCH)
    loader = Loader(index, plan, BatchShard(0, 1, BATCH, 1), DataConfig(threads=2), PillowDecoder(SIZE), SIZE, 16)
    batches = loader.batches(0, len(index) // BATCH)
    normalize(next(batches).images, MEAN, STD)
    batches.close()


def timed(action: Callable[[Path], None], argument: Path) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    action(argument)
    return time.perf_counter() - start


def open_millions(folder: Path, count: int) -> tuple[float, float, float]:
    """Return the median seconds and bytes of private memory to open a synthetic index, and its size in bytes."""
    rows = np.zeros(count, ENTRY_DTYPE)
    rows["shard"] = np.arange(count)
    text = np.tile(np.frombuffer(b"n01440764/n01440764_10026.JPEG", np.uint8), count)
    ends = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(30)
    path = folder / "synthetic.index"
    write_index(path, rows, ShardPaths("/data", text, ends), {"usable": count, "classes": [], "source": "", "problems": []})
    del rows, text, ends
    runs = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", OPEN, str(path)], capture_output=True, text=True, check=True)
        runs.append([float(word) for word in done.stdout.split()])
    seconds, memory = (statistics.median(values) for values in zip(*runs, strict=True))
    return seconds, memory, path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=200_000, help="JPEG files to write (default: %(default)s)")
    parser.add_argument("--millions", type=float, default=14, help="million images in the large index (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed starts of each kind (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="folder for the files (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        make_files(folder / "images", args.files)
        building = {}
        for verify in (False, True):
            start = time.perf_counter()
            build_index(str(folder / "images"), folder / "images.index", verify=verify)
            building[verify] = time.perf_counter() - start
        samples: dict[str, list[float]] = {"ImageFolder": [], "index": []}
        for number in range(args.rounds):
            turns = [
                ("ImageFolder", load_with_image_folder, folder / "images"),
                ("index", load_with_index, folder / "images.index"),
            ]
            for name, action, argument in turns if number % 2 else turns[::-1]:
                samples[name].append(timed(action, argument))
        scans = []
        for _ in range(args.rounds):
            start = time.perf_counter()
            datasets.ImageFolder(str(folder / "images"))
            scans.append(time.perf_counter() - start)
        opened, memory, size = open_millions(folder, int(args.millions * 1e6))
    finally:
        shutil.rmtree(folder)
    medians = {name: statistics.median(times) for name, times in samples.items()}
    scan = statistics.median(scans)
    scale = 1_281_167 / args.files
    table = [
        {"what": f"ImageFolder, first batch of {args.files:,} images", "seconds": f"{medians['ImageFolder']:.2f}"},
        {"what": f"  listing only, {scan / args.files * 1e6:.1f} us per file", "seconds": f"{scan:.2f}"},
        {"what": "  listing of 1,281,167 files at this rate", "seconds": f"{scan * scale:.1f}"},
        {"what": f"index, first batch of {args.files:,} images", "seconds": f"{medians['index']:.3f}"},
        {"what": f"index of {args.millions:g} million images ({size / 1e9:.2f} GB) opened", "seconds": f"{opened:.4f}"},
        {"what": f"  its private memory: {memory / 1e6:.2f} MB", "seconds": ""},
        {"what": "index built once, headers only", "seconds": f"{building[False]:.1f}"},
        {"what": "index built once, every image decoded", "seconds": f"{building[True]:.1f}"},
    ]
    ratios = [a / b for a, b in zip(samples["ImageFolder"], samples["index"], strict=True)]
    save(
        args.out,
        device=torch.device("cpu"),
        title=f"Time to the first batch, medians of {args.rounds} rounds taken in turns; ImageFolder / index "
        f"{statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f})",
        table=table,
        samples=samples,
        listing=scans,
        open_bytes=memory,
    )


if __name__ == "__main__":
    main()
