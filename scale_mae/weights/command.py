"""The commands ``convert``, ``init`` and ``inspect``. This module does not import torch."""

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
    add(
        "--to",
        required=True,
        choices=WEIGHT_FORMATS,
        help="vit_mae (transformers), mae (reference repository) and state_dict contain the whole MAE; "
        "timm, vit (transformers), onnx and torch_export contain its encoder; "
        "for a classifier use any format except vit_mae and mae",
    )
    add("--out", required=True, metavar="PATH", help="the file (.safetensors, .pth, .onnx, .pt2) or folder to write")
    add("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="dtype of the weights (default: %(default)s)")
    add("--image-size", type=_parse_size, metavar="N|HxW", help="interpolate the position embeddings to this size in pixels")
    add("--pool", choices=["token", "avg"], help="pooling of an encoder (default: token)")
    add("--ema", action="store_true", help="export the moving average of the weights (optim.ema_decay)")
    add("--probe", type=int, metavar="N", help="number of the linear probe to export, from 0 (default: the best)")
    add("--max-shard-gb", type=float, metavar="GB", help="largest file of a state_dict folder (default: 5)")


def _add_init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", metavar="WEIGHTS", help=WEIGHTS_HELP)
    add_recipe_arguments(parser, "model.image_size=448")
    parser.add_argument("--out", required=True, metavar="FILE.safetensors", help="the file to write")


def _add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a run directory, a checkpoint, an export, or a file or folder of weights")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _parse_size(text: str) -> tuple[int, int]:
    if not (sides := re.fullmatch(r"(\d+)(?:x(\d+))?", text)):
        raise argparse.ArgumentTypeError(f"{text} is neither N nor HxW (pixels)")
    return int(sides[1]), int(sides[2] or sides[1])


def convert(args: argparse.Namespace) -> int:
    """Run ``scale-mae convert``."""
    from scale_mae.checkpoint.discovery import start_verification
    from scale_mae.checkpoint.paths import is_run_or_checkpoint

    sys.setswitchinterval(1e-4)  # seconds; lets the checksum threads run while torch is being imported
    verification = start_verification(args.checkpoint) if is_run_or_checkpoint(Path(args.checkpoint)) else None
    gc.disable()  # collecting the objects of torch, during its import and at exit, would take half a second
    from scale_mae.weights.convert import convert

    gc.freeze()
    gc.enable()

    options = {key: getattr(args, key) for key in ("dtype", "image_size", "pool", "ema", "probe", "max_shard_gb")}
    print(convert(args.checkpoint, args.to, args.out, **options, warn=warn, verification=verification))
    return 0


def init(args: argparse.Namespace) -> int:
    """Run ``scale-mae init``."""
    from scale_mae.weights.initialization import write_initial_weights

    config = load_config(args.recipe, [*args.overrides, f"model.init_from={args.weights}"])
    print(f"{args.out}: {write_initial_weights(config, args.out, warn)}")
    return 0


def inspect(args: argparse.Namespace) -> int:
    """Run ``scale-mae inspect``."""
    from scale_mae.checkpoint.errors import CheckpointError
    from scale_mae.weights.inspection import inspect, render

    report = inspect(args.path)
    print(json.dumps(report, indent=2) if args.json else render(report))
    if report["problem"]:
        raise CheckpointError(report["problem"])
    return 0


WEIGHT_COMMANDS = (
    Command(
        name="convert",
        group="weights",
        summary="Convert a checkpoint to inference weights for timm, Hugging Face, ONNX and others.",
        description="The export is loaded and compared with the checkpoint before it gets its name.",
        example="scale-mae convert runs/demo --to timm --out encoder.safetensors",
        add_arguments=_add_convert_arguments,
        run=convert,
    ),
    Command(
        name="init",
        group="weights",
        summary="Write the initial weights of a pre-training run: weights of any source, matched to a recipe.",
        description="A run reads them with model.init_from.",
        example="scale-mae init runs/demo demo --out initial.safetensors model.image_size=64",
        add_arguments=_add_init_arguments,
        run=init,
    ),
    Command(
        name="inspect",
        group="weights",
        summary="Show what a run directory, checkpoint, export or file of weights contains, and verify it.",
        example="scale-mae inspect runs/demo",
        add_arguments=_add_inspect_arguments,
        run=inspect,
    ),
)
