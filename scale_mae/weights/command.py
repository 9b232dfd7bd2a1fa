"""The commands that turn weights into others and look at them: ``convert``, ``init``, ``inspect``. Imports no torch."""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
from pathlib import Path

from scale_mae.config import load_config
from scale_mae.system.command_line import CHECKPOINT_HELP, WEIGHTS_HELP, Command, add_recipe_arguments, warn

WEIGHT_FORMATS = ("timm", "vit_mae", "vit", "mae", "state_dict", "onnx", "torch_export")


def _add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help=f"{CHECKPOINT_HELP}; with --to state_dict also a plain DeepSpeed checkpoint")
    add("--to", required=True, choices=WEIGHT_FORMATS, help="mae, vit_mae, state_dict: all; else encoder, or classifier")
    add("--out", required=True, metavar="PATH", help="a file (.safetensors, .pth, .onnx, .pt2) or a folder")
    add("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="type of the weights (default: %(default)s)")
    add("--image-size", type=_size, metavar="N|HxW", help="interpolate the position tables to this many pixels")
    add("--pool", choices=["token", "avg"], help="pooling of an encoder (default: token)")
    add("--ema", action="store_true", help="the moving average of the weights (optim.ema_decay)")
    add("--probe", type=int, metavar="N", help="number of a linear probe in the sweep, from 0 (default: the best)")
    add("--max-shard-gb", type=float, metavar="GB", help="largest file of a state_dict folder (default: 5)")


def _add_init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", metavar="WEIGHTS", help=WEIGHTS_HELP)
    add_recipe_arguments(parser, "model.image_size=448")
    parser.add_argument("--out", required=True, metavar="FILE.safetensors", help="the file to write")


def _add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a run directory, checkpoint, export or file of weights")
    parser.add_argument("--json", action="store_true", help="print JSON")


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


WEIGHT_COMMANDS = (
    Command(
        name="convert",
        group="weights",
        summary="Write a checkpoint as inference weights for timm, Hugging Face, ONNX and others.",
        description="The written file is loaded and compared with the checkpoint (docs/guides/converting.md).",
        example="scale-mae convert runs/demo --to timm --out encoder.safetensors",
        add_arguments=_add_convert_arguments,
        run=convert,
    ),
    Command(
        name="init",
        group="weights",
        summary="Write the weights that a run would start from: a file of weights, adapted to a recipe.",
        example="scale-mae init runs/demo finetune_demo --out start.safetensors",
        add_arguments=_add_init_arguments,
        run=init,
    ),
    Command(
        name="inspect",
        group="weights",
        summary="Describe a run directory, checkpoint, export or file of weights, and verify it.",
        example="scale-mae inspect runs/demo",
        add_arguments=_add_inspect_arguments,
        run=inspect,
    ),
)
