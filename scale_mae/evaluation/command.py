"""The commands that measure encoders and classifiers: ``evaluate``, ``knn``, ``logistic``, ``embed``, ``results``. Imports no
torch."""

from __future__ import annotations

import argparse
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from scale_mae.config import UserError
from scale_mae.distributed.launcher import rank_and_size
from scale_mae.weights.command import warn

if TYPE_CHECKING:
    from scale_mae.distributed.process_group import World
    from scale_mae.evaluation.classifier import Subject
    from scale_mae.evaluation.features import Source
    from scale_mae.evaluation.results import Result
    from scale_mae.system.progress import ProgressBar

SET_NAMES = (
    *("imagenet1k", "imagenet_c", "imagenet_a", "imagenet_r", "imagenet_sketch"),
    *("inat2017", "inat2018", "inat2019", "places205", "places365", "folder"),
)
FORMS = ("terminal", "markdown", "latex")


def add_evaluation_commands(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Their arguments; ``add`` makes a parser of a name and a text."""
    sub = add("evaluate", "Accuracy of a classifier on a set, beside published figures (docs/evaluation.md).")
    sub.add_argument("model", metavar="MODEL", help="weights with a head: of the reference, timm, Hugging Face or ours")
    sub.add_argument("--on", required=True, choices=SET_NAMES, help="the set; folder: any labelled SOURCE")
    sub.add_argument("--root", required=True, metavar="DIR", help="folder of the set")
    sub.add_argument("--size", type=_number, metavar="N", help="side of the images in pixels (default: that of the weights)")
    sub.add_argument("--crop-pct", type=float, metavar="R", help="share looked at (default: its own, or the reference's)")
    sub.add_argument("--classes", metavar="FILE", help="name of each output, one a line; or the index it was trained on")
    _common(sub)

    sub = add("knn", "Nearest-neighbour accuracy of an encoder.")
    _two_sources(sub)
    sub.add_argument("--k", type=int, default=20, help="neighbours (default: %(default)s)")
    sub.add_argument("--untrained", action="store_true", help="also the same encoder with its initial weights")

    sub = add("logistic", "Accuracy of a logistic regression on the frozen features of an encoder.")
    _two_sources(sub)

    text = "Features of all images of a source, by any number of processes. Interrupted, it goes on."
    sub = add("embed", text)
    sub.add_argument("encoder", metavar="WEIGHTS")
    sub.add_argument("source", metavar="SOURCE")
    sub.add_argument("--out", required=True, metavar="FILE", help=".npy, .safetensors or .parquet")
    sub.add_argument("--pool", default="mean", choices=["mean", "token"], help="of the tokens (default: %(default)s)")
    sub.add_argument("--size", type=_number, metavar="N", help="side of the images in pixels (default: that of the weights)")
    sub.add_argument("--batch-size", type=_number, default=64, metavar="N", help="of a process (default: %(default)s)")

    sub = add("results", "Tabulate result files: mean and spread over seeds.")
    sub.add_argument("places", nargs="*", default=["results"], metavar="DIR|FILE", help="default: results")
    sub.add_argument("--format", default="terminal", choices=FORMS, help="default: %(default)s")


def _two_sources(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("encoder", metavar="WEIGHTS")
    sub.add_argument("--train", required=True, metavar="SOURCE", help="labelled images to learn from")
    sub.add_argument("--val", required=True, metavar="SOURCE", help="labelled images to classify")
    _common(sub)


def _common(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--batch-size", type=_number, default=64, metavar="N", help="of a process (default: %(default)s)")
    sub.add_argument("--seed", type=int, metavar="N", help="of the training, where the weights do not tell it")
    sub.add_argument("--out", metavar="FILE.json", help="write a result file, e.g. results/NAME.json")


def _number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return number


@contextmanager
def _together(what: str, out: str | None) -> Iterator[tuple[World, ProgressBar, Callable[[str], None]]]:
    """The processes, a bar that the first of them shows, and how it tells things; ``out`` is what they will write."""
    from scale_mae.distributed.process_group import process_group
    from scale_mae.system.progress import ProgressBar

    main = rank_and_size()[0] == 0
    with process_group() as world, ProgressBar(what, shown=main) as bar:
        world.on_main(lambda: _check_writable(out))
        yield world, bar, lambda text: print(text, flush=True) if main else None


def _check_writable(out: str | None) -> None:
    """Make the folder of a file and try whether one can be made there, now and not after hours of measuring.

    Raises:
        UserError: it cannot.
    """
    if not out:
        return
    path = Path(out)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        trial = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # as what is written will be called at first
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def _frozen(args: argparse.Namespace, world: World) -> tuple[Subject, Source, Source]:
    """The encoder and the two sources of ``knn`` and ``logistic``."""
    from scale_mae.evaluation.classifier import load_subject
    from scale_mae.evaluation.features import Source

    subject = world.together(lambda: load_subject(args.encoder, warn))
    return subject, *world.on_main(lambda: (Source.labelled(args.train), Source.labelled(args.val)))


def _finish(result: Result, out: str | None, world: World, tell: Callable[[str], None]) -> None:
    if out:
        world.on_main(lambda: result.write(out))
        tell(f"{out}: written")


def evaluate(args: argparse.Namespace) -> int:
    """``scale-mae evaluate``."""
    from scale_mae.evaluation.classifier import load_classifier
    from scale_mae.evaluation.evaluate import evaluate
    from scale_mae.evaluation.published_results import beside

    with _together("images", args.out) as (world, bar, tell):
        subject = world.together(lambda: load_classifier(args.model, warn, args.size))
        options = {"crop_pct": args.crop_pct, "batch": args.batch_size, "classes": args.classes, "seed": args.seed}
        result, unlike = evaluate(subject, args.on, args.root, world, **options, progress=bar.move, tell=tell)
        scores = ", ".join(
            f"{name} {value:.4f}" if name.startswith("loss") else f"{name} {value:.2%}" for name, value in result.scores.items()
        )
        tell(f"{args.on}: {scores} ({result.data['images']} images, {subject.architecture})")
        if (table := beside(args.on, subject.architecture, result.scores, unlike)) is not None:
            tell("\n" + table.render())
        _finish(result, args.out, world, tell)
    return 0


def knn(args: argparse.Namespace) -> int:
    """``scale-mae knn``."""
    from scale_mae.evaluation.knn import knn_accuracy
    from scale_mae.weights.encoders import untrained_encoder

    with _together("images", args.out) as (world, bar, tell):
        subject, train, val = _frozen(args, world)
        begun = world.together(lambda: untrained_encoder(args.encoder, warn)).state_dict() if args.untrained else None
        result = knn_accuracy(subject, train, val, world, args.k, args.batch_size, args.seed, bar.move)
        tell(f"trained: k-NN top-1 {result.scores['top1']:.2%} ({result.data['images']} images, k={args.k})")
        if begun:
            subject.model.load_state_dict(begun)
            untrained = knn_accuracy(subject, train, val, world, args.k, args.batch_size, args.seed, bar.move)
            tell(f"untrained: k-NN top-1 {untrained.scores['top1']:.2%} ({untrained.data['images']} images, k={args.k})")
            result.scores["untrained_top1"] = untrained.scores["top1"]
        _finish(result, args.out, world, tell)
    return 0


def logistic(args: argparse.Namespace) -> int:
    """``scale-mae logistic``."""
    from scale_mae.evaluation.logistic_regression import logistic_accuracy

    with _together("images", args.out) as (world, bar, tell):
        subject, train, val = _frozen(args, world)
        result = logistic_accuracy(subject, train, val, world, args.batch_size, args.seed, bar.move)
        chosen = result.parts["chosen"]["l2"]
        tell(f"logistic regression top-1 {result.scores['top1']:.2%} ({result.data['images']} images, L2 {chosen:g})")
        _finish(result, args.out, world, tell)
    return 0


def embed(args: argparse.Namespace) -> int:
    """``scale-mae embed``."""
    from scale_mae.evaluation.classifier import load_subject
    from scale_mae.evaluation.embed import embed

    with _together("images", args.out) as (world, bar, tell):
        subject = world.together(lambda: load_subject(args.encoder, warn, args.size))
        told = embed(subject, args.source, args.out, world, pool=args.pool, batch=args.batch_size, progress=bar.move)
        tell(told)
    return 0


def results(args: argparse.Namespace) -> int:
    """``scale-mae results``."""
    from scale_mae.evaluation.results import find_results, tabulate

    print(tabulate(find_results(args.places)).render(args.format))
    return 0


EVALUATION_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "evaluate": evaluate,
    "knn": knn,
    "logistic": logistic,
    "embed": embed,
    "results": results,
}
