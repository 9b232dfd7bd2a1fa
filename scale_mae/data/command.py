"""The commands that prepare images: ``sources``, ``index`` and ``pack``. Imports no torch."""

from __future__ import annotations

import argparse

from scale_mae.config import UserError
from scale_mae.system.command_line import SOURCE_HELP, Command, positive_int, warn

SOURCE_KINDS = {  # example -> what it is
    "/data/train": "class folders, root/class/image; other folders may lie between class and image",
    "/data/photos": "a folder of images without labels",
    "/data/shards": "a folder of tar shards in the WebDataset format, with key.jpg next to key.cls",
    "/data/train-{000..146}.tar": "a numbered list of tar shards",
    "/data/list.txt": "a list with one path per line, optionally followed by a label; paths are relative to the list",
    "/data/list.csv": "a table (.csv or .tsv) with the columns path and, optionally, label",
    "/data/annotations.json": "annotations in COCO format",
    "imagenet.index": "an index of any source, written by `scale-mae index`",
    "/fast/packed": "a folder written by `scale-mae pack`",
    "demo:train, demo:val": "the images that scale_mae contains: 10,000 and 2,000 labeled images of Fashion-MNIST",
}


def _add_index_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE", help=SOURCE_HELP)
    add("--out", required=True, metavar="FILE.index", help="the index to write")
    add("--workers", type=positive_int, metavar="N", help="number of processes (default: one per core)")
    add("--no-verify", action="store_true", help="read image headers only; much faster, but finds less damage")


def _add_pack_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE", help=SOURCE_HELP)
    add("--out", required=True, metavar="DIR", help="folder for the shards and their index")
    add("--short-side", type=int, default=256, metavar="PIXELS", help="scale larger images down to it (default: %(default)s)")
    add("--quality", type=int, default=90, metavar="Q", help="JPEG quality, 1 to 95 (default: %(default)s)")
    add("--shard-mb", type=float, default=256, metavar="MB", help="size of a shard (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the shuffled order (default: %(default)s)")
    add("--workers", type=positive_int, metavar="N", help="number of processes (default: one per core)")


def sources(args: argparse.Namespace) -> int:
    """``scale-mae sources``."""
    from scale_mae.data.dataset_layouts import LAYOUTS

    print("A SOURCE of images, also the value of data.source and classify.val_source, is one of:\n")
    for example, meaning in SOURCE_KINDS.items():
        print(f"  {example:28}{meaning}")
    print("\nor a data set in the form in which it is distributed, NAME:SPLIT:ROOT, such as imagenet1k:train:/data/imagenet:\n")
    print(f"  {'NAME':14}SPLITS")
    for name, (splits, _) in LAYOUTS.items():
        print(f"  {name:14}{', '.join(splits)}")
    return 0


def index(args: argparse.Namespace) -> int:
    """``scale-mae index``."""
    from scale_mae.data.index import INDEX_SUFFIX
    from scale_mae.data.index_builder import build_index
    from scale_mae.system.progress import ProgressBar

    if not args.out.endswith(INDEX_SUFFIX):
        raise UserError(f"--out {args.out}: not the name of an index. Give a name that ends in {INDEX_SUFFIX}.")
    with ProgressBar("images") as bar:
        built = build_index(args.source, args.out, verify=not args.no_verify, workers=args.workers, progress=bar.update)
    for problem in built.problems:
        warn(problem)
    if counts := built.quarantine_counts():
        listed = ", ".join(f"{number} {cause}" for cause, number in counts.items())
        warn(f"images that are quarantined and never used: {listed}. {args.out}.quarantined.txt lists them.")
    print(f"{args.out}: {len(built)} images, {len(built.classes)} named classes, digest {built.digest}")
    return 0


def pack(args: argparse.Namespace) -> int:
    """``scale-mae pack``."""
    from scale_mae.data.pack import pack
    from scale_mae.system.progress import ProgressBar

    options = {key: getattr(args, key) for key in ("short_side", "quality", "shard_mb", "seed", "workers")}
    with ProgressBar("images") as bar:
        packed = pack(args.source, args.out, **options, progress=bar.update)
    for line in packed.skipped:
        warn(f"skipped {line}")
    print(f"{args.out}: {len(packed.index)} images in {len(packed.index.shards)} shards. Train with data.source={args.out}")
    return 0


DATA_COMMANDS = (
    Command(
        name="sources",
        group="data",
        summary="List the kinds of image sources and the named data sets.",
        example="scale-mae sources",
        run=sources,
    ),
    Command(
        name="index",
        group="data",
        summary="Find and check all images of a source once, for any number of runs.",
        description="Run the same command again to continue after an interruption.",
        example="scale-mae index demo:train --out demo.index",
        add_arguments=_add_index_arguments,
        run=index,
    ),
    Command(
        name="pack",
        group="data",
        summary="Re-encode a source as small, clean, shuffled tar shards with an index.",
        description="Run the same command again to continue after an interruption.",
        example="scale-mae pack demo:train --out packed --shard-mb 4",
        add_arguments=_add_pack_arguments,
        run=pack,
    ),
)
