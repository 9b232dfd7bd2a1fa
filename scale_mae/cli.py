"""The console command. Each subcommand is a few lines that call one function."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import time
from collections.abc import Sequence

from scale_mae.config import UserError, json_schema, load_config, recipes
from scale_mae.evaluation.command import EVALUATION_COMMANDS, add_evaluation_commands
from scale_mae.preflight.command import add_arguments as add_preflight_arguments
from scale_mae.preflight.command import run_command as run_preflight
from scale_mae.report.command import REPORT_COMMANDS, add_report_commands
from scale_mae.slurm.command import JOB_COMMANDS, add_job_commands
from scale_mae.weights.command import WEIGHT_COMMANDS, add_weight_commands, warn

EPILOG = """\
A RECIPE is a shipped name or the path of a YAML file. Shipped are
{recipes}.
A CHECKPOINT is a run directory (its newest good checkpoint) or one checkpoint in it.
WEIGHTS are a CHECKPOINT, an export, or a file or folder of the reference repository, timm or Hugging Face.
A SOURCE of images is an index, class folders (root/class/image), a folder or {{00..99}} list of tar shards, a .txt or .csv
list, a .json with annotations, demo:train, demo:val, or a data set as it is handed out: NAME:SPLIT:ROOT with NAME one of
imagenet1k, imagenet21k, inat2017, inat2018, inat2019, places205, places365, coco.
Several processes: torchrun --nproc-per-node N -m scale_mae pretrain RECIPE; under Slurm, srun alone.
"""


TRAINING = {
    "pretrain": "Pre-train",
    "finetune": "Train a classifier from an encoder's weights or from scratch",
    "linprobe": "Train a linear classifier on a frozen encoder",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scale-mae",
        description="Pre-train masked autoencoders at scale and use what they learn.",
        epilog=EPILOG.format(recipes=textwrap.fill(", ".join(recipes()), 120)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, epilog=parser.epilog)
        sub.formatter_class = argparse.RawDescriptionHelpFormatter
        return sub

    for name, text in TRAINING.items():
        sub = add(name, f"{text}, or continue a run directory where its newest checkpoint stands.")
        sub.add_argument("recipe", metavar="RECIPE")
        sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. train.global_batch=1024")
        sub.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")

    add_job_commands(add)

    sub = add("index", "Find and check all images of a source, once, for any number of runs. Interrupted, it goes on.")
    sub.add_argument("source", metavar="SOURCE")
    sub.add_argument("--out", required=True, metavar="FILE.index")
    sub.add_argument("--workers", type=_count, metavar="N", help="processes (default: the cores)")
    sub.add_argument("--no-verify", action="store_true", help="read the headers only; much faster, finds less damage")

    sub = add("pack", "Re-encode a source into small, clean, shuffled tar shards with their index. Interrupted, it goes on.")
    sub.add_argument("source", metavar="SOURCE")
    sub.add_argument("--out", required=True, metavar="DIR")
    sub.add_argument("--short-side", type=int, default=256, metavar="PIXELS", help="scaled down to (default: %(default)s)")
    sub.add_argument("--quality", type=int, default=90, help="of the JPEGs (default: %(default)s)")
    sub.add_argument("--shard-mb", type=float, default=256, metavar="MB", help="size of a shard (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="of the order (default: %(default)s)")
    sub.add_argument("--workers", type=_count, metavar="N", help="processes (default: the cores)")

    add_weight_commands(add)

    sub = add("reconstruct", "Draw masked | reconstruction | original, one row an image and mask ratio.")
    sub.add_argument("checkpoint", metavar="CHECKPOINT")
    sub.add_argument("images", nargs="+", metavar="IMAGE")
    sub.add_argument("--out", required=True, metavar="FILE.png")
    sub.add_argument("--mask-ratio", nargs="+", type=float, default=[0.75], metavar="R", help="shares hidden (default: 0.75)")

    add_evaluation_commands(add)
    add_report_commands(add)

    add("doctor", "Look over versions, accelerators, DALI, DeepSpeed, disk and memory; say what to do about problems.")
    text = "Look over all nodes of a job just before it trains, and name the bad ones in DIR/slurm/bad_nodes."
    add_preflight_arguments(add("preflight", text))
    add("schema", "Print the JSON Schema of a recipe, for editors.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it did what was asked, 2 for what the user can put right."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and hasattr(args, "overrides") and not any(word.startswith("-") for word in rest):
        args.overrides += rest  # argparse takes no positional words after an option
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(COMMANDS[args.command](args) or 0)
    except UserError as error:
        _complain(error)
        return 2
    except BrokenPipeError:  # of whoever reads what we print
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("scale-mae: interrupted", file=sys.stderr)
        return 130


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of processes")
    return number


def _complain(error: UserError) -> None:
    """One line, from one process: the others of a job fail with the same error."""
    from scale_mae.distributed.launcher import rank_and_size

    try:
        rank, _ = rank_and_size()
    except UserError:
        rank = 0
    if rank == 0:
        print(f"scale-mae: error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(5)  # a launcher that ends the job with its first failed process must not silence rank 0


def train(args: argparse.Namespace) -> int:
    """``scale-mae pretrain``, ``finetune`` and ``linprobe``."""
    config = load_config(args.recipe, args.overrides)
    if config.run.task != args.command:
        raise UserError(f"{args.recipe}: a recipe for scale-mae {config.run.task} (its run.task), not for {args.command}")
    if args.dry_run:
        from scale_mae.distributed.launcher import rank_and_size

        _, processes = rank_and_size()
        accumulation = config.accumulation(processes)
        config.deepspeed_json()
        print(config.to_yaml(), end="")
        print(f"# {processes} processes: accumulation {accumulation}, peak learning rate {config.peak_lr:.6g}")
        return 0
    import scale_mae

    getattr(scale_mae, args.command)(config)
    return 0


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


def reconstruct(args: argparse.Namespace) -> int:
    """``scale-mae reconstruct``."""
    from scale_mae.checkpoint.store import locate, read_config, read_manifest
    from scale_mae.evaluation.reconstruct import draw
    from scale_mae.weights.models import load_mae

    checkpoint = locate(args.checkpoint, warn)
    step = read_manifest(checkpoint).step
    print(draw(load_mae(checkpoint), read_config(checkpoint), args.images, args.out, args.mask_ratio, step))
    return 0


def doctor(args: argparse.Namespace) -> int:
    """``scale-mae doctor``."""
    from scale_mae.doctor import examine

    return examine()


def schema(args: argparse.Namespace) -> int:
    """``scale-mae schema``."""
    print(json.dumps(json_schema(), indent=2))
    return 0


COMMANDS = {
    **dict.fromkeys(TRAINING, train),
    **JOB_COMMANDS,
    "index": index,
    "pack": pack,
    **WEIGHT_COMMANDS,
    "reconstruct": reconstruct,
    **EVALUATION_COMMANDS,
    **REPORT_COMMANDS,
    "doctor": doctor,
    "preflight": run_preflight,
    "schema": schema,
}
