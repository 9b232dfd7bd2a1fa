"""A classifier measured on a set, as published figures were: the protocol behind ``scale-mae evaluate``."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from statistics import fmean

from scale_mae.config import UserError
from scale_mae.data.crop_boxes import REFERENCE_SIDE, reference_crop_pct
from scale_mae.distributed.process_group import World
from scale_mae.evaluation.accuracy import Score, score
from scale_mae.evaluation.classifier import Subject
from scale_mae.evaluation.dataset_checks import deviations
from scale_mae.evaluation.datasets import SETS, Part, parts_of, read_classes
from scale_mae.evaluation.image_loader import View, central_view
from scale_mae.evaluation.published_results import differences
from scale_mae.evaluation.results import Result, content_digest, made_by, model_facts
from scale_mae.evaluation.robustness import CORRUPTIONS, corruption_errors, mean_corruption_error, unnormalised_error

PUBLISHED_CLASSES = {"imagenet1k": 1000, "imagenet_c": 1000, "imagenet_a": 1000, "imagenet_r": 1000, "imagenet_sketch": 1000}
Tell = Callable[[str], None]


def evaluate(
    subject: Subject,
    name: str,
    root: str,
    world: World,
    *,
    crop_pct: float | None = None,
    batch: int = 64,
    classes: str | None = None,
    seed: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    tell: Tell = print,
) -> tuple[Result, list[str]]:
    """Measure a classifier. All processes call it and get the same.

    Args:
        subject: with a head; the model is moved to this process's device.
        name: of :data:`scale_mae.evaluation.datasets.SETS`.
        root: the set's folder; of ``folder`` any labelled source.
        world: the processes.
        crop_pct: share of the scaled short side that is cut out; None: as the model's own config has it, else as the
            reference does.
        batch: images at a time, a process.
        classes: names of the model's outputs, see :func:`scale_mae.evaluation.datasets.read_classes`.
        seed: of the training, if the weights do not say.
        progress: called with (images of a part done by this process, all of them).
        tell: what deviates from the published set, before anything is scored; and of each part of a set that has several.

    Returns:
        The result, and why it may not be compared with the published figures (empty: it may).

    Raises:
        UserError: see :func:`scale_mae.evaluation.datasets.parts_of` and :func:`scale_mae.evaluation.accuracy.score`.
    """
    began, (view, how) = time.monotonic(), _view(name, subject, crop_pct)
    subject.model.to(world.device)
    parts, deviating = _listed(name, root, subject, classes, world)
    for text in deviating:
        tell(f"{name}: {text}")
    found: dict[str, Score] = {}
    for part in _from_main(parts, world):
        found[part.name] = score(subject, part, view, world, batch, progress)
        if name == "imagenet_c":
            tell(f"{part.name}: top-1 {found[part.name].top1:.2%} ({found[part.name].images} images)")
    data = {
        "root": os.path.abspath(root) if os.path.exists(root) else root,
        "images": sum(each.images for each in found.values()),
        "digest": content_digest([each.content for each in found.values()]),
    }
    result = Result(
        {"name": "evaluate", "set": name, **how},
        model_facts(subject, seed),
        data,
        _scores(name, found),
        _parts(name, found),
        made_by(world.size, str(world.device.type), time.monotonic() - began),
    )
    return result, _unlike(name, subject, found, how["crop_pct"] in (None, reference_crop_pct(subject.size))) + deviating


def _listed(name: str, root: str, subject: Subject, classes: str | None, world: World) -> tuple[list[Part], list[str]]:
    """The parts, for now on rank 0 alone (those of ImageNet-C take 400 MB), and how they deviate from the published set."""
    parts: list[Part] = []

    def look() -> list[str]:
        names = read_classes(classes, subject.classes, subject.names)
        parts.extend(parts_of(name, root, names, subject.classes))
        return deviations(parts, SETS[name])

    return parts, world.run_on_main(look)


def _unlike(name: str, subject: Subject, found: dict[str, Score], cropped: bool) -> list[str]:
    """Why a result may not be compared with the published ones."""
    published, known = SETS[name].images, PUBLISHED_CLASSES.get(name)
    return differences(
        subject.architecture,
        not published or all(each.images in published for each in found.values()),
        sum(each.images for each in found.values()),
        cropped,
        (subject.classes, known) if known else None,
    )


def _view(name: str, subject: Subject, crop_pct: float | None) -> tuple[View, dict[str, object]]:
    """How pixels are made, and what a result file says of it."""
    size = subject.size
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise UserError(f"--crop-pct {crop_pct}: a share above 0 and up to 1")
    stored = name == "imagenet_c" and size <= REFERENCE_SIDE  # its files are the central 224 pixels already
    if stored and crop_pct is not None:
        raise UserError("--crop-pct: the files of imagenet_c are central crops already; only their centre is cut out")
    share = None if stored else crop_pct or subject.crop_pct or reference_crop_pct(size)
    resized = "none" if share is None else f"short side to {int(size / share)}, bicubic"
    return central_view(size, share), {"size": size, "crop_pct": share, "resize": resized, "crop": "centre"}


def _from_main(parts: list[Part], world: World) -> Iterator[Part]:
    """Rank 0 has them and hands out one at a time."""
    while (part := world.run_on_main(lambda: parts.pop(0) if parts else None)) is not None:
        yield part


def _plain(each: Score) -> dict[str, float]:
    return {"top1": each.top1, "top5": each.top5, "loss": each.loss}


def _scores(name: str, found: dict[str, Score]) -> dict[str, float]:
    if name != "imagenet_c":
        (only,) = found.values()
        return _plain(only)
    top1 = {part: each.top1 for part, each in found.items()}
    common = [each for part, each in found.items() if part.split("/")[0] in CORRUPTIONS]
    scores = {"mce": mean_corruption_error(top1)}
    if (unnormalised := unnormalised_error(top1)) is not None:
        scores["error_19_unnormalised"] = unnormalised
    scores |= {f"{key}_15": fmean(getattr(each, key) for each in common) for key in ("top1", "top5", "loss")}
    return scores


def _parts(name: str, found: dict[str, Score]) -> dict[str, dict[str, float]]:
    """Scores of the parts of ImageNet-C, and error over AlexNet's of each corruption; of other sets nothing."""
    if name != "imagenet_c":
        return {}
    each = {part: _plain(score) | {"images": score.images} for part, score in found.items()}
    errors = corruption_errors({part: score.top1 for part, score in found.items()})
    return each | {corruption: {"error_over_alexnet": error} for corruption, error in errors.items()}
