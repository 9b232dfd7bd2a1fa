"""The commands that evaluate encoders and classifiers. This module imports no torch, so that help is fast."""

from __future__ import annotations

import argparse
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from scale_mae.config import UserError
from scale_mae.distributed.launcher import get_rank_and_world_size
from scale_mae.system.command_line import CHECKPOINT_HELP, SOURCE_HELP, WEIGHTS_HELP, Command, positive_int, warn

if TYPE_CHECKING:
    from scale_mae.distributed.process_group import World
    from scale_mae.evaluation.features import LabeledSource
    from scale_mae.evaluation.models import EvaluatedModel
    from scale_mae.evaluation.results import Result
    from scale_mae.system.progress import ProgressBar

SET_NAMES = (
    *("imagenet1k", "imagenet_c", "imagenet_a", "imagenet_r", "imagenet_sketch"),
    *("inat2017", "inat2018", "inat2019", "places205", "places365", "folder"),
)
FORMS = ("terminal", "markdown", "latex")


def _add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"weights with a classification head: {WEIGHTS_HELP}")
    add(
        "--on",
        required=True,
        choices=SET_NAMES,
        metavar="NAME",
        help=f"one of {', '.join(SET_NAMES)} (folder: any labeled source)",
    )
    add("--root", required=True, metavar="DIR", help="folder of the data set")
    add("--size", type=positive_int, metavar="N", help="side of the images in pixels (default: that of the weights)")
    add(
        "--crop-pct",
        type=float,
        metavar="R",
        help="center crop, as a share of the short side (default: that of the weights)",
    )
    add("--classes", metavar="FILE", help="name of each output, one a line; or the index it was trained on")
    _add_measurement_arguments(parser)


def _add_knn_arguments(parser: argparse.ArgumentParser) -> None:
    _add_encoder_and_sources(parser)
    parser.add_argument("--k", type=int, default=20, help="number of neighbors (default: %(default)s)")
    parser.add_argument("--untrained", action="store_true", help="also measure the same encoder with its initial weights")


def _add_embed_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("encoder", metavar="WEIGHTS", help=WEIGHTS_HELP)
    add("source", metavar="SOURCE", help=SOURCE_HELP)
    add("--out", required=True, metavar="FILE", help=".npy, .safetensors or .parquet")
    add("--pool", default="mean", choices=["mean", "token"], help="pooling of the tokens (default: %(default)s)")
    add("--size", type=positive_int, metavar="N", help="side of the images in pixels (default: that of the weights)")
    add("--batch-size", type=positive_int, default=64, metavar="N", help="images per batch and process (default: %(default)s)")


def _add_reconstruct_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    add("images", nargs="+", metavar="IMAGE", help="image files")
    add("--out", required=True, metavar="FILE.png", help="the picture to write")
    add("--mask-ratio", nargs="+", type=float, default=[0.75], metavar="R", help="share of hidden patches (default: 0.75)")


def _add_results_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("places", nargs="*", default=["results"], metavar="DIR|FILE", help="result files (default: results)")
    parser.add_argument("--format", default="terminal", choices=FORMS, help="form of the table (default: %(default)s)")


def _add_encoder_and_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("encoder", metavar="WEIGHTS", help=WEIGHTS_HELP)
    parser.add_argument("--train", required=True, metavar="SOURCE", help="labeled images to fit on (`scale-mae sources`)")
    parser.add_argument("--val", required=True, metavar="SOURCE", help="labeled images to classify")
    _add_measurement_arguments(parser)


def _add_measurement_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--batch-size", type=positive_int, default=64, metavar="N", help="images per batch and process (default: %(default)s)")
    add("--seed", type=int, metavar="N", help="seed of the training run, for weights that do not record it")
    add("--out", metavar="FILE.json", help="write a result file, e.g. results/NAME.json")


@contextmanager
def _process_group(what: str, out: str | None) -> Iterator[tuple[World, ProgressBar, Callable[[str], None]]]:
    """Start the process group. Yield it, a progress bar and a print function; both are active on rank 0 only."""
    from scale_mae.distributed.process_group import process_group
    from scale_mae.system.progress import ProgressBar

    main = get_rank_and_world_size()[0] == 0
    with process_group() as world, ProgressBar(what, shown=main) as bar:
        world.run_on_main(lambda: _check_writable(out))
        yield world, bar, lambda text: print(text, flush=True) if main else None


def _check_writable(out: str | None) -> None:
    """Check that an output file can be written, before hours of measurement. Create its folder.

    Raises:
        UserError: It cannot be written.
    """
    if not out:
        return
    path = Path(out)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        trial = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # the name of the staging file of Result.write
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def _load_encoder_and_sources(args: argparse.Namespace, world: World) -> tuple[EvaluatedModel, LabeledSource, LabeledSource]:
    """Load the encoder and open the two sources of ``knn`` and ``logistic``."""
    from scale_mae.evaluation.features import LabeledSource
    from scale_mae.evaluation.models import load_frozen_encoder

    evaluated = world.run_on_all(lambda: load_frozen_encoder(args.encoder, warn))
    return evaluated, *world.run_on_main(lambda: (LabeledSource.open(args.train), LabeledSource.open(args.val)))


def _finish(result: Result, out: str | None, world: World, report: Callable[[str], None]) -> None:
    if out:
        world.run_on_main(lambda: result.write(out))
        report(f"Wrote {out}.")


def evaluate(args: argparse.Namespace) -> int:
    """``scale-mae evaluate``."""
    from scale_mae.evaluation.evaluate import evaluate
    from scale_mae.evaluation.models import load_classifier
    from scale_mae.evaluation.published_results import comparison_table

    with _process_group("images", args.out) as (world, bar, report):
        evaluated = world.run_on_all(lambda: load_classifier(args.model, warn, args.size))
        options = {"crop_pct": args.crop_pct, "batch": args.batch_size, "classes": args.classes, "seed": args.seed}
        result, issues = evaluate(evaluated, args.on, args.root, world, **options, progress=bar.update, report=report)
        scores = ", ".join(
            f"{name} {value:.4f}" if name.startswith("loss") else f"{name} {value:.2%}" for name, value in result.scores.items()
        )
        report(f"{args.on}: {scores} ({result.data['images']} images, {evaluated.architecture})")
        if (table := comparison_table(args.on, evaluated.architecture, result.scores, issues)) is not None:
            report("\n" + table.render())
        _finish(result, args.out, world, report)
    return 0


def knn(args: argparse.Namespace) -> int:
    """``scale-mae knn``."""
    from scale_mae.evaluation.knn import knn_accuracy
    from scale_mae.weights.model_loader import load_untrained_encoder

    with _process_group("images", args.out) as (world, bar, report):
        evaluated, train, val = _load_encoder_and_sources(args, world)
        untrained_state = (
            world.run_on_all(lambda: load_untrained_encoder(args.encoder, warn)).state_dict() if args.untrained else None
        )
        result = knn_accuracy(evaluated, train, val, world, args.k, args.batch_size, args.seed, bar.update)
        report(f"trained: k-NN top-1 {result.scores['top1']:.2%} ({result.data['images']} images, k={args.k})")
        if untrained_state:
            evaluated.model.load_state_dict(untrained_state)
            untrained = knn_accuracy(evaluated, train, val, world, args.k, args.batch_size, args.seed, bar.update)
            report(f"untrained: k-NN top-1 {untrained.scores['top1']:.2%} ({untrained.data['images']} images, k={args.k})")
            result.scores["untrained_top1"] = untrained.scores["top1"]
        _finish(result, args.out, world, report)
    return 0


def logistic(args: argparse.Namespace) -> int:
    """``scale-mae logistic``."""
    from scale_mae.evaluation.logistic_regression import logistic_regression_accuracy

    with _process_group("images", args.out) as (world, bar, report):
        evaluated, train, val = _load_encoder_and_sources(args, world)
        result = logistic_regression_accuracy(evaluated, train, val, world, args.batch_size, args.seed, bar.update)
        chosen = result.parts["chosen"]["l2"]
        report(f"logistic regression top-1 {result.scores['top1']:.2%} ({result.data['images']} images, L2 {chosen:g})")
        _finish(result, args.out, world, report)
    return 0


def embed(args: argparse.Namespace) -> int:
    """``scale-mae embed``."""
    from scale_mae.evaluation.embed import embed
    from scale_mae.evaluation.models import load_frozen_encoder

    with _process_group("images", args.out) as (world, bar, report):
        evaluated = world.run_on_all(lambda: load_frozen_encoder(args.encoder, warn, args.size))
        summary = embed(evaluated, args.source, args.out, world, pool=args.pool, batch=args.batch_size, progress=bar.update)
        report(summary)
    return 0


def reconstruct(args: argparse.Namespace) -> int:
    """``scale-mae reconstruct``."""
    from scale_mae.checkpoint.discovery import locate_checkpoint
    from scale_mae.checkpoint.manifest import read_config, read_manifest
    from scale_mae.evaluation.reconstruct import draw_reconstructions
    from scale_mae.weights.model_loader import load_mae

    checkpoint = locate_checkpoint(args.checkpoint, warn)
    step = read_manifest(checkpoint).step
    print(draw_reconstructions(load_mae(checkpoint), read_config(checkpoint), args.images, args.out, args.mask_ratio, step))
    return 0


def results(args: argparse.Namespace) -> int:
    """``scale-mae results``."""
    from scale_mae.evaluation.results import find_results, tabulate

    print(tabulate(find_results(args.places)).render(args.format))
    return 0


EVALUATION_COMMANDS = (
    Command(
        name="evaluate",
        group="evaluate",
        summary="Measure the accuracy of a classifier on a data set, next to published results.",
        example="scale-mae evaluate runs/finetune_demo --on folder --root demo:val --out results/finetune_demo.json",
        add_arguments=_add_evaluate_arguments,
        run=evaluate,
    ),
    Command(
        name="knn",
        group="evaluate",
        summary="Measure the nearest-neighbor accuracy of an encoder.",
        example="scale-mae knn runs/demo --train demo:train --val demo:val",
        add_arguments=_add_knn_arguments,
        run=knn,
    ),
    Command(
        name="logistic",
        group="evaluate",
        summary="Measure the accuracy of a logistic regression on the frozen features of an encoder.",
        example="scale-mae logistic runs/demo --train demo:train --val demo:val",
        add_arguments=_add_encoder_and_sources,
        run=logistic,
    ),
    Command(
        name="embed",
        group="evaluate",
        summary="Write the features of all images of a source to a file.",
        description="Run it with any number of processes. Run the same command again to continue after an interruption.",
        example="scale-mae embed runs/demo demo:val --out features.npy",
        add_arguments=_add_embed_arguments,
        run=embed,
    ),
    Command(
        name="reconstruct",
        group="evaluate",
        summary="Draw masked image, reconstruction and original side by side.",
        example="scale-mae reconstruct runs/demo runs/demo/images/*.jpg --out reconstruction.png --mask-ratio 0.75 0.9",
        add_arguments=_add_reconstruct_arguments,
        run=reconstruct,
    ),
    Command(
        name="results",
        group="evaluate",
        summary="Print a table of result files with mean and standard deviation over seeds.",
        example="scale-mae results results --format markdown",
        add_arguments=_add_results_arguments,
        run=results,
    ),
)
