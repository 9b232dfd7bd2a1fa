"""The commands that prepare images: ``index`` and ``pack``. Imports no torch."""

from __future__ import annotations

import argparse

from scale_mae.config import UserError
from scale_mae.system.command_line import SOURCE_HELP, Command, positive_int, warn


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
    add("--quality", type=int, default=90, metavar="Q", help="JPEG quality, 1 to 100 (default: %(default)s)")
    add("--shard-mb", type=float, default=256, metavar="MB", help="size of a shard (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the shuffled order (default: %(default)s)")
    add("--workers", type=positive_int, metavar="N", help="number of processes (default: one per core)")


def index(args: argparse.Namespace) -> int:
    """``scale-mae index``."""
    from scale_mae.data.index import SUFFIX
    from scale_mae.data.index_builder import build
    from scale_mae.system.progress import ProgressBar

    if not args.out.endswith(SUFFIX):
        raise UserError(f"--out {args.out}: the name of an index ends in {SUFFIX}")
    with ProgressBar("images") as bar:
        built = build(args.source, args.out, verify=not args.no_verify, workers=args.workers, progress=bar.move)
    for problem in built.problems:
        warn(problem)
    if causes := built.causes():
        listed = ", ".join(f"{number} {cause}" for cause, number in causes.items())
        warn(f"quarantined, never trained on: {listed}; named in {args.out}.quarantined.txt")
    print(f"{args.out}: {len(built)} images, {len(built.classes)} named classes, digest {built.digest}")
    return 0


def pack(args: argparse.Namespace) -> int:
    """``scale-mae pack``."""
    from scale_mae.data.pack import pack
    from scale_mae.system.progress import ProgressBar

    options = {key: getattr(args, key) for key in ("short_side", "quality", "shard_mb", "seed", "workers")}
    with ProgressBar("images") as bar:
        packed = pack(args.source, args.out, **options, progress=bar.move)
    for line in packed.left_out:
        warn(f"left out {line}")
    print(f"{args.out}: {len(packed.index)} images in {len(packed.index.shards)} shards; data.source={args.out}")
    return 0


DATA_COMMANDS = (
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
