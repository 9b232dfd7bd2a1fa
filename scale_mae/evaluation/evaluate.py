"""The protocol of ``scale-mae evaluate``: measures a classifier on a data set as the published results were measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from statistics import fmean

from scale_mae.config import UserError
from scale_mae.data.crop_boxes import REFERENCE_SIDE, reference_crop_pct
from scale_mae.distributed.process_group import World
from scale_mae.evaluation.accuracy import Score, score_part
from scale_mae.evaluation.corruption_error import CORRUPTIONS, corruption_errors, mean_corruption_error, unnormalized_error
from scale_mae.evaluation.dataset_checks import find_deviations
from scale_mae.evaluation.datasets import DATASETS, DatasetPart, list_parts, read_classes
from scale_mae.evaluation.image_loader import ImageTransform, center_crop_transform
from scale_mae.evaluation.models import EvaluatedModel
from scale_mae.evaluation.published_results import differences
from scale_mae.evaluation.results import Result, content_digest, measurement_metadata, model_metadata

PUBLISHED_CLASSES = {"imagenet1k": 1000, "imagenet_c": 1000, "imagenet_a": 1000, "imagenet_r": 1000, "imagenet_sketch": 1000}
Report = Callable[[str], None]


def evaluate(
    evaluated: EvaluatedModel,
    name: str,
    root: str,
    world: World,
    *,
    crop_pct: float | None = None,
    batch: int = 64,
    classes: str | None = None,
    seed: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    report: Report = print,
) -> tuple[Result, list[str]]:
    """Measure a classifier. All processes call it and get the same result.

    Args:
        evaluated: The model, with a head. It is moved to this process's device.
        name: A key of :data:`scale_mae.evaluation.datasets.DATASETS`.
        root: The folder of the data set. For ``folder``, any labeled source.
        world: The process group.
        crop_pct: The center crop as a share of the resized short side. ``None``: the value in the model's config, else the
            reference's.
        batch: Images per batch and process.
        classes: The names of the model's outputs; see :func:`scale_mae.evaluation.datasets.read_classes`.
        seed: The seed of the training run, for weights that do not record it.
        progress: Receives (images of a part done by this process, all of its images).
        report: Receives deviations from the published data set before scoring, and the scores of ImageNet-C's parts.

    Returns:
        The result, and the reasons why it is not comparable with the published ones (empty: it is comparable).

    Raises:
        UserError: See :func:`scale_mae.evaluation.datasets.list_parts` and
            :func:`scale_mae.evaluation.accuracy.score_classifiers`.
    """
    began, (view, protocol) = time.monotonic(), _transform(name, evaluated, crop_pct)
    evaluated.model.to(world.device)
    parts, deviating = _list_parts(name, root, evaluated, classes, world)
    for text in deviating:
        report(f"{name}: {text}")
    found: dict[str, Score] = {}
    for part in _broadcast_parts(parts, world):
        found[part.name] = score_part(evaluated, part, view, world, batch, progress)
        if name == "imagenet_c":
            report(f"{part.name}: top-1 {found[part.name].top1:.2%} ({found[part.name].images} images)")
    data = {
        "root": os.path.abspath(root) if os.path.exists(root) else root,
        "images": sum(each.images for each in found.values()),
        "digest": content_digest([each.content for each in found.values()]),
    }
    result = Result(
        {"name": "evaluate", "set": name, **protocol},
        model_metadata(evaluated, seed),
        data,
        _scores(name, found),
        _parts(name, found),
        measurement_metadata(world.size, str(world.device.type), time.monotonic() - began),
    )
    reference_crop = protocol["crop_pct"] in (None, reference_crop_pct(evaluated.size))
    return result, _comparability_issues(name, evaluated, found, reference_crop) + deviating


def _list_parts(
    name: str, root: str, evaluated: EvaluatedModel, classes: str | None, world: World
) -> tuple[list[DatasetPart], list[str]]:
    """Return the parts, on rank 0 only (those of ImageNet-C take 400 MB), and how they deviate from the published data set."""
    parts: list[DatasetPart] = []

    def list_on_main() -> list[str]:
        names = read_classes(classes, evaluated.classes, evaluated.names)
        parts.extend(list_parts(name, root, names, evaluated.classes))
        return find_deviations(parts, DATASETS[name])

    return parts, world.run_on_main(list_on_main)


def _comparability_issues(name: str, evaluated: EvaluatedModel, found: dict[str, Score], cropped: bool) -> list[str]:
    """Return the reasons why a result is not comparable with the published ones."""
    published, known = DATASETS[name].images, PUBLISHED_CLASSES.get(name)
    return differences(
        evaluated.architecture,
        not published or all(each.images in published for each in found.values()),
        sum(each.images for each in found.values()),
        cropped,
        (evaluated.classes, known) if known else None,
    )


def _transform(name: str, evaluated: EvaluatedModel, crop_pct: float | None) -> tuple[ImageTransform, dict[str, object]]:
    """Return the transform of the images, and its description in the result file."""
    size = evaluated.size
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise UserError(f"--crop-pct {crop_pct}: must be above 0 and at most 1")
    stored = name == "imagenet_c" and size <= REFERENCE_SIDE  # its files are 224 x 224 center crops
    if stored and crop_pct is not None:
        raise UserError("--crop-pct: the files of imagenet_c are center crops already; leave the option out")
    share = None if stored else crop_pct or evaluated.crop_pct or reference_crop_pct(size)
    resized = "none" if share is None else f"short side to {int(size / share)}, bicubic"
    return center_crop_transform(size, share), {"size": size, "crop_pct": share, "resize": resized, "crop": "center"}


def _broadcast_parts(parts: list[DatasetPart], world: World) -> Iterator[DatasetPart]:
    """Send one part at a time from rank 0 to all processes."""
    while (part := world.run_on_main(lambda: parts.pop(0) if parts else None)) is not None:
        yield part


def _as_dict(each: Score) -> dict[str, float]:
    return {"top1": each.top1, "top5": each.top5, "loss": each.loss}


def _scores(name: str, found: dict[str, Score]) -> dict[str, float]:
    if name != "imagenet_c":
        (only,) = found.values()
        return _as_dict(only)
    top1 = {part: each.top1 for part, each in found.items()}
    common = [each for part, each in found.items() if part.split("/")[0] in CORRUPTIONS]
    scores = {"mce": mean_corruption_error(top1)}
    if (unnormalized := unnormalized_error(top1)) is not None:
        scores["error_19_unnormalized"] = unnormalized
    scores |= {f"{key}_15": fmean(getattr(each, key) for each in common) for key in ("top1", "top5", "loss")}
    return scores


def _parts(name: str, found: dict[str, Score]) -> dict[str, dict[str, float]]:
    """Return the scores of ImageNet-C's parts, and the error of each corruption over AlexNet's; nothing for other data sets."""
    if name != "imagenet_c":
        return {}
    each = {part: _as_dict(score) | {"images": score.images} for part, score in found.items()}
    errors = corruption_errors({part: score.top1 for part, score in found.items()})
    return each | {corruption: {"error_over_alexnet": error} for corruption, error in errors.items()}
