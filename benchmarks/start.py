"""How soon training begins: an index against torchvision's ImageFolder, and an index of 14 million images.

python benchmarks/start.py --out benchmarks/results/start_cpu_NAME.json

Writes 200,000 small JPEG files in 1,000 class folders and times, in turns, from nothing to the first batch of 64 images:
ImageFolder + DataLoader (which lists every folder first), and the index. All files are in the page cache for both, so a
shared file system, where listing is slower by far, is the better for the index. The folder and the index are left out of
the time of the loop; how long the index took to build once is in the table.
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

from scale_mae.config.sections import DataConfig
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
own = psutil.Process().memory_full_info
before, began = own().uss, time.perf_counter()
index = Index.open(sys.argv[1])
index.location(len(index) // 2)
print(time.perf_counter() - began, own().uss - before)
"""


def make_files(root: Path, count: int) -> None:
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


def with_image_folder(root: Path) -> None:
    data = datasets.ImageFolder(str(root), reference_transform(SIZE))
    next(iter(torch.utils.data.DataLoader(data, BATCH, shuffle=True, num_workers=2)))


def with_index(path: Path) -> None:
    index = Index.open(path)
    plan = SamplePlan(0, len(index), BATCH)
    loader = Loader(index, plan, BatchShard(0, 1, BATCH, 1), DataConfig(threads=2), PillowDecoder(SIZE), SIZE, 16)
    batches = loader.batches(0, len(index) // BATCH)
    normalize(next(batches).images, MEAN, STD)
    batches.close()


def timed(action: Callable[[Path], None], argument: Path) -> float:
    began = time.perf_counter()
    action(argument)
    return time.perf_counter() - began


def open_millions(folder: Path, count: int) -> tuple[float, float, float]:
    """Median seconds and bytes of own memory to open a synthetic index, and its size in bytes."""
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
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--millions", type=float, default=14)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        make_files(folder / "images", args.files)
        building = {}
        for verify in (False, True):
            began = time.perf_counter()
            build_index(str(folder / "images"), folder / "images.index", verify=verify)
            building[verify] = time.perf_counter() - began
        samples: dict[str, list[float]] = {"ImageFolder": [], "index": []}
        for number in range(args.rounds):
            turns = [("ImageFolder", with_image_folder, folder / "images"), ("index", with_index, folder / "images.index")]
            for name, action, argument in turns if number % 2 else turns[::-1]:
                samples[name].append(timed(action, argument))
        scans = []
        for _ in range(args.rounds):
            began = time.perf_counter()
            datasets.ImageFolder(str(folder / "images"))
            scans.append(time.perf_counter() - began)
        opened, memory, size = open_millions(folder, int(args.millions * 1e6))
    finally:
        shutil.rmtree(folder)
    medians = {name: statistics.median(times) for name, times in samples.items()}
    scan = statistics.median(scans)
    more = 1_281_167 / args.files
    table = [
        {"what": f"ImageFolder, first batch of {args.files:,} images", "seconds": f"{medians['ImageFolder']:.2f}"},
        {"what": f"  of which listing, {scan / args.files * 1e6:.1f} us a file", "seconds": f"{scan:.2f}"},
        {"what": "  listing of 1,281,167 files at that rate", "seconds": f"{scan * more:.1f}"},
        {"what": f"index, first batch of {args.files:,} images", "seconds": f"{medians['index']:.3f}"},
        {"what": f"index of {args.millions:g} million images ({size / 1e9:.2f} GB) opened", "seconds": f"{opened:.4f}"},
        {"what": f"  own memory that takes: {memory / 1e6:.2f} MB", "seconds": ""},
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
