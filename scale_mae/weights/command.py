"""The commands that turn weights into others and look at them: ``convert``, ``init``, ``inspect``. Imports no torch."""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from scale_mae.config import load_config

WEIGHT_FORMATS = ("timm", "vit_mae", "vit", "mae", "state_dict", "onnx", "torch_export")


def add_weight_commands(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Their arguments; ``add`` makes a parser of a name and a text."""
    sub = add("convert", "Write a checkpoint as inference weights, verified against it (docs/weights.md).")
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="for --to state_dict also a folder of plain DeepSpeed code")
    sub.add_argument(
        "--to", required=True, choices=WEIGHT_FORMATS, help="mae, vit_mae, state_dict: all; else encoder, or classifier"
    )
    sub.add_argument("--out", required=True, metavar="PATH", help="a file (.safetensors, .pth, .onnx, .pt2) or a folder")
    sub.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="of the weights (default: %(default)s)")
    sub.add_argument("--image-size", type=_size, metavar="N|HxW", help="interpolate the position tables to this many pixels")
    sub.add_argument("--pool", choices=["token", "avg"], help="of an encoder (default: token)")
    sub.add_argument("--ema", action="store_true", help="the moving average of the weights (optim.ema_decay)")
    sub.add_argument("--probe", type=int, metavar="N", help="of a linear probe's sweep, from 0 (default: the best)")
    sub.add_argument("--max-shard-gb", type=float, metavar="GB", help="largest file of a state_dict folder (default: 5)")

    sub = add("init", "Write all weights that a run would begin with: those of a file from anywhere, fitted to a recipe.")
    sub.add_argument("weights", metavar="WEIGHTS")
    sub.add_argument("recipe", metavar="RECIPE")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. model.image_size=448")
    sub.add_argument("--out", required=True, metavar="FILE.safetensors")

    sub = add("inspect", "Say what a run directory, checkpoint, export or file of weights is, and whether it is sound.")
    sub.add_argument("path", metavar="PATH")
    sub.add_argument("--json", action="store_true", help="for programs")


def _size(text: str) -> tuple[int, int]:
    if not (sides := re.fullmatch(r"(\d+)(?:x(\d+))?", text)):
        raise argparse.ArgumentTypeError(f"{text} is neither a side nor HxW in pixels")
    return int(sides[1]), int(sides[2] or sides[1])


def convert(args: argparse.Namespace) -> int:
    """``scale-mae convert``."""
    from scale_mae.checkpoint.store import begin, is_ours

    sys.setswitchinterval(1e-4)  # seconds; the threads that take checksums must not wait for the import of torch
    begun = begin(args.checkpoint) if is_ours(Path(args.checkpoint)) else None
    gc.disable()  # to look for garbage in what torch brings, now and at the end, would take half a second
    from scale_mae.weights.convert import convert

    gc.freeze()
    gc.enable()

    options = {key: getattr(args, key) for key in ("dtype", "image_size", "pool", "ema", "probe", "max_shard_gb")}
    print(convert(args.checkpoint, args.to, args.out, **options, warn=warn, begun=begun))
    return 0


def init(args: argparse.Namespace) -> int:
    """``scale-mae init``."""
    from scale_mae.weights.initialization import write_initial

    config = load_config(args.recipe, [*args.overrides, f"model.init_from={args.weights}"])
    print(f"{args.out}: {write_initial(config, args.out, warn)}")
    return 0


def inspect(args: argparse.Namespace) -> int:
    """``scale-mae inspect``."""
    from scale_mae.checkpoint.store import CheckpointError
    from scale_mae.weights.inspect import inspect, render

    report = inspect(args.path)
    print(json.dumps(report, indent=2) if args.json else render(report))
    if report["problem"]:
        raise CheckpointError(report["problem"])
    return 0


def warn(message: str) -> None:
    """What a command could do all the same, but its user should know; one line to standard error."""
    print(f"scale-mae: warning: {message}", file=sys.stderr)


WEIGHT_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {"convert": convert, "init": init, "inspect": inspect}
