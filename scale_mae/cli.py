"""The console command. Each subcommand is a few lines that call one function."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

from scale_mae.config import UserError, json_schema, load_config, recipes

EPILOG = """\
A RECIPE is a shipped name ({recipes}) or the path of a YAML file.
A CHECKPOINT is a run directory (its newest good checkpoint) or one checkpoint in it.
A SOURCE is class folders (root/class/image), a folder or {{00..99}} list of tar shards, demo:train or demo:val.
Several processes: torchrun --nproc-per-node N -m scale_mae pretrain RECIPE; under Slurm, srun alone.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scale-mae",
        description="Pre-train masked autoencoders at scale and use what they learn.",
        epilog=EPILOG.format(recipes=", ".join(recipes())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, epilog=parser.epilog)
        sub.formatter_class = argparse.RawDescriptionHelpFormatter
        return sub

    sub = add("pretrain", "Pre-train, or continue a run directory where its newest checkpoint stands.")
    sub.add_argument("recipe", metavar="RECIPE")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. train.global_batch=1024")
    sub.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")

    sub = add("convert", "Write a checkpoint's encoder as inference weights.")
    sub.add_argument("checkpoint", metavar="CHECKPOINT")
    sub.add_argument("--to", required=True, choices=["timm"], help="format of the file")
    sub.add_argument("--out", required=True, metavar="FILE.safetensors")
    sub.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="of the weights (default: %(default)s)")

    sub = add("reconstruct", "Draw masked | reconstruction | original, one row an image and mask ratio.")
    sub.add_argument("checkpoint", metavar="CHECKPOINT")
    sub.add_argument("images", nargs="+", metavar="IMAGE")
    sub.add_argument("--out", required=True, metavar="FILE.png")
    sub.add_argument("--mask-ratio", nargs="+", type=float, default=[0.75], metavar="R", help="shares hidden (default: 0.75)")

    sub = add("knn", "Nearest-neighbour accuracy of an encoder: an exported file, a run directory or a checkpoint.")
    sub.add_argument("encoder", metavar="ENCODER")
    sub.add_argument("--train", required=True, metavar="SOURCE", help="labelled images to compare with")
    sub.add_argument("--val", required=True, metavar="SOURCE", help="labelled images to classify")
    sub.add_argument("--k", type=int, default=20, help="neighbours (default: %(default)s)")
    sub.add_argument("--untrained", action="store_true", help="also the same encoder with its initial weights")

    add("doctor", "Look over versions, accelerators, DALI, DeepSpeed, disk and memory; say what to do about problems.")
    add("schema", "Print the JSON Schema of a recipe, for editors.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it did what was asked, 2 for what the user can put right."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command == "pretrain" and not any(word.startswith("-") for word in rest):
        args.overrides += rest  # argparse takes no positional words after an option
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(COMMANDS[args.command](args) or 0)
    except UserError as error:
        _complain(error)
        return 2


def _complain(error: UserError) -> None:
    """One line, from one process: the others of a job fail with the same error."""
    from scale_mae.engine.distributed import rank_and_size

    try:
        rank, _ = rank_and_size()
    except UserError:
        rank = 0
    if rank == 0:
        print(f"scale-mae: error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(5)  # a launcher that ends the job with its first failed process must not silence rank 0


def pretrain(args: argparse.Namespace) -> int:
    """``scale-mae pretrain``."""
    config = load_config(args.recipe, args.overrides)
    if args.dry_run:
        from scale_mae.engine.distributed import rank_and_size

        _, processes = rank_and_size()
        accumulation = config.accumulation(processes)
        config.deepspeed_json()
        print(config.to_yaml(), end="")
        print(f"# {processes} processes: accumulation {accumulation}, peak learning rate {config.peak_lr:.6g}")
        return 0
    from scale_mae.train import pretrain as run

    run(config)
    return 0


def convert(args: argparse.Namespace) -> int:
    """``scale-mae convert``."""
    from scale_mae.checkpoint.export import convert_to_timm

    print(convert_to_timm(args.checkpoint, args.out, args.dtype, _warn))
    return 0


def reconstruct(args: argparse.Namespace) -> int:
    """``scale-mae reconstruct``."""
    from scale_mae.checkpoint.export import load_mae
    from scale_mae.checkpoint.store import locate, read_config, read_manifest
    from scale_mae.evaluate.reconstruct import draw

    checkpoint = locate(args.checkpoint, _warn)
    step = read_manifest(checkpoint).step
    print(draw(load_mae(checkpoint), read_config(checkpoint), args.images, args.out, args.mask_ratio, step))
    return 0


def knn(args: argparse.Namespace) -> int:
    """``scale-mae knn``."""
    import torch

    from scale_mae.checkpoint.export import load_encoder, untrained_encoder
    from scale_mae.evaluate.knn import knn_accuracy

    encoders = {"trained": load_encoder(args.encoder, _warn)}
    if args.untrained:
        encoders["untrained"] = untrained_encoder(args.encoder, _warn)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, encoder in encoders.items():
        encoder.to(device)
        result = knn_accuracy(encoder, args.train, args.val, args.k)
        print(f"{name}: k-NN top-1 {result.top1:.2%} ({result.images} images, k={result.k})", flush=True)
    return 0


def doctor(args: argparse.Namespace) -> int:
    """``scale-mae doctor``."""
    from scale_mae.doctor import examine

    return examine()


def schema(args: argparse.Namespace) -> int:
    """``scale-mae schema``."""
    print(json.dumps(json_schema(), indent=2))
    return 0


def _warn(message: str) -> None:
    print(f"scale-mae: warning: {message}", file=sys.stderr)


COMMANDS = {
    "pretrain": pretrain,
    "convert": convert,
    "reconstruct": reconstruct,
    "knn": knn,
    "doctor": doctor,
    "schema": schema,
}
