"""Images a second that reach the model: our loader with each decoder, and torchvision's ImageFolder + DataLoader.

python benchmarks/photos.py /tmp/photos                        (once: 2,000 photographs of about 500 x 375 pixels)
python benchmarks/loader.py /tmp/photos --out benchmarks/results/loader_cpu_NAME.json
python benchmarks/loader.py /tmp/photos --decoders pillow dali_cpu dali_gpu        (where there is a GPU)

Every variant makes normalised fp32 batches of random-size crops with the same distribution: torchvision with the transform of
the reference implementation and as many worker processes as the others have threads. "packed" are the same photographs after
scale-mae pack (short side 256, quality 90). The variants take turns, every second round in reverse order; a turn starts
afresh, lets two batches pass and times the next ones. Whatever is faster than the model is fast enough; on a GPU the last
column says how many of these images a second ViT-B/16 could train on at 40 % of an H100's peak.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Generator
from functools import partial
from pathlib import Path

import torch
from batches import MEAN, SIZE, STD, our_batches, turn
from report import save
from torch import Tensor
from torchvision import datasets, transforms

from scale_mae.data.index_builder import build_index
from scale_mae.data.pack import pack


def reference_transform(size: tuple[int, int]) -> transforms.Compose:
    """That of the reference implementation's pre-training."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def torchvision_batches(folder: Path, batch: int, workers: int) -> Generator[Tensor, None, None]:
    data = datasets.ImageFolder(str(folder), reference_transform(SIZE))
    loader = torch.utils.data.DataLoader(data, batch, shuffle=True, num_workers=workers, drop_last=True)
    while True:
        yield from (images for images, _ in loader)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="class folders of JPEG files")
    parser.add_argument("--decoders", nargs="+", default=["pillow", "dali_cpu"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=20, help="timed in a turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with tempfile.TemporaryDirectory() as temporary:
        index = build_index(str(args.folder), Path(temporary) / "photos.index")
        packed = pack(str(args.folder), Path(temporary) / "packed").index
        sizes = [f"mean {found.entries['length'].mean() / 1e3:.0f} KB, {len(found)} images" for found in (index, packed)]
        sources = {"torchvision": partial(torchvision_batches, args.folder, args.batch, args.threads)}
        for name in args.decoders:
            for where, images in (("", index), (", packed", packed)):
                sources[name + where] = partial(our_batches, images, name, args.batch, args.threads, device)
        rates: dict[str, list[float]] = {name: [] for name in sources}
        for number in range(args.rounds):
            for name in list(sources) if number % 2 else list(sources)[::-1]:
                rates[name].append(turn(sources[name], batches=args.batches).images_per_s)
    table = []
    for name, found in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(found, rates["torchvision"], strict=True)]
        table.append(
            {
                "variant": name,
                "median images/s": f"{statistics.median(found):.0f}",
                "/ torchvision: median (min-max)": f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
                "ViT-B on how many H100s": f"{statistics.median(found) / 6770:.2f}",
            }
        )
    save(
        args.out,
        device=device,
        title=f"Loading {sizes[0]} (packed: {sizes[1]}) as batches of {args.batch}, {args.threads} threads or workers, "
        f"{args.rounds} rounds taken in turns",
        table=table,
        rates=rates,
    )


if __name__ == "__main__":
    main()
