"""The data sets that classifiers are evaluated on: where their images are, and which model output belongs to which class.

Robustness data sets: ImageNet-C (Hendrycks & Dietterich 2019), -A (Hendrycks et al. 2021, natural adversarial examples), -R
(Hendrycks et al. 2021, renditions), -Sketch (Wang et al. 2019). Each stores its images in folders named by WordNet ID.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scale_mae.data.errors import DataError, escape_unprintable
from scale_mae.data.image_list import NO_LABEL
from scale_mae.data.index import INDEX_SUFFIX, Index, existing_index
from scale_mae.data.index_builder import list_source
from scale_mae.data.source_check import check_source
from scale_mae.evaluation.corruption_error import CORRUPTIONS, EXTRA_CORRUPTIONS, SEVERITIES

ARCHIVES = ("", "noise", "blur", "weather", "digital", "extra")  # folders into which ImageNet-C's archives may be unpacked
THREADS = 16  # that check whether files exist
_is_synset = re.compile(r"n\d{8}").fullmatch


@dataclass(frozen=True)
class EvaluationDataset:
    """A published data set.

    Attributes:
        images: The number of images in each published edition. For ImageNet-C, of each severity of each corruption.
        synsets: The name of the list of its WordNet IDs, see :func:`synsets`. Empty: the classes are unknown.
        own_classes_only: The prediction is the largest output among the data set's own classes.
        folders: Folders below the root that may contain the class folders. Empty: ``layout`` names a source.
        layout: The source, with ``{root}`` in place of the root folder.
    """

    images: Sequence[int] = ()
    synsets: str = ""
    own_classes_only: bool = False
    folders: Sequence[str] = ()
    layout: str = ""

    def published(self, names: Collection[str]) -> Sequence[str]:
        """Return the published classes, or nothing if they are unknown or if no name in ``names`` is one of them."""
        known = synsets(self.synsets) if self.synsets else ()
        return () if set(names).isdisjoint(known) else known


DATASETS: dict[str, EvaluationDataset] = {
    "imagenet1k": EvaluationDataset([50_000], "imagenet", layout="imagenet1k:val:{root}"),
    "imagenet_c": EvaluationDataset([50_000], "imagenet"),
    "imagenet_a": EvaluationDataset([7_500], "imagenet_a", own_classes_only=True, folders=("", "imagenet-a")),
    "imagenet_r": EvaluationDataset([30_000], "imagenet_r", own_classes_only=True, folders=("", "imagenet-r")),
    "imagenet_sketch": EvaluationDataset(
        [50_000, 50_889], "imagenet", folders=("", "sketch", "imagenet-sketch", "ImageNet-Sketch")
    ),
    "inat2017": EvaluationDataset([95_986], layout="inat2017:val:{root}"),
    "inat2018": EvaluationDataset([24_426], layout="inat2018:val:{root}"),
    "inat2019": EvaluationDataset([3_030], layout="inat2019:val:{root}"),
    "places205": EvaluationDataset([20_500], layout="places205:val:{root}"),
    "places365": EvaluationDataset([36_500], layout="places365:val:{root}"),
    "folder": EvaluationDataset(layout="{root}"),
}


@dataclass(frozen=True)
class DatasetPart:
    """A part of a data set with a score of its own.

    Attributes:
        name: ``corruption/severity`` for a part of ImageNet-C, else the name of the data set.
        index: Its images.
        outputs: The model output of each class of the index. ``None``: class ``i`` is output ``i``.
        competing: The outputs that the prediction chooses from, in ascending order. ``None``: all.
        empty: Class folders without images.
    """

    name: str
    index: Index
    outputs: Sequence[int] | None
    competing: Sequence[int] | None
    empty: Sequence[str] = ()

    def targets(self) -> tuple[NDArray[np.int64], list[int] | None]:
        """Return the true output of each image ``[N]``, as a position in the competing outputs, and the competing outputs."""
        labels = _output_of_each(self.index, self.outputs)
        if self.competing is None:
            return labels, None
        return np.searchsorted(self.competing, labels), list(self.competing)


@functools.cache
def synsets(name: str) -> tuple[str, ...]:
    """Return timm's list of WordNet IDs in alphabetical order: ``imagenet`` (1,000), ``imagenet_a`` or ``imagenet_r`` (200)."""
    return tuple(resources.files("timm.data").joinpath(f"_info/{name}_synsets.txt").read_text("utf-8").split())


def read_classes(source: str | None, outputs: int, known: Sequence[str] = ()) -> list[str] | None:
    """Return the class name of each output of a model, or ``None`` if the names are unknown.

    Args:
        source: A text file with one name per line, or the index of the training images. ``None``: use ``known``, or the
            WordNet IDs of ImageNet in alphabetical order for a model with 1,000 outputs.
        outputs: The number of outputs.
        known: The names that the weights' metadata contains, or nothing.

    Raises:
        DataError: The number of names differs from the number of outputs.
    """
    if source is None and known:
        return list(known)
    if source is None:
        return list(synsets("imagenet")) if outputs == 1000 else None
    try:
        text = "" if source.endswith(INDEX_SUFFIX) else Path(source).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--classes {source}: cannot be read ({error})") from None
    names = list(Index.open(source).classes) if source.endswith(INDEX_SUFFIX) else text.split("\n")
    names = [name.strip() for name in names if name.strip()]
    if len(names) != outputs or len(set(names)) != outputs:
        raise DataError(f"--classes {source}: {len(set(names))} different names, but the model has {outputs} classes")
    return names


def list_parts(name: str, root: str, classes: Sequence[str] | None, outputs: int) -> list[DatasetPart]:
    """List the images of all parts of a data set.

    Args:
        name: A key of :data:`DATASETS`.
        root: The folder of the data set. For ``folder``, any labeled source.
        classes: The names from :func:`read_classes`.
        outputs: The number of model outputs.

    Raises:
        DataError: Something is missing or empty, an image has no label, or the model does not have one of the classes.
    """
    chosen = DATASETS[name]
    if name == "imagenet_c":
        sources = find_corruption_folders(root)
    elif chosen.folders:
        sources = {name: find_class_folders(root, name, chosen.folders)}
    else:
        sources = {name: chosen.layout.format(root=root)}
    return [_part(part, source, chosen, classes, outputs) for part, source in sources.items()]


def find_class_folders(root: str, name: str, places: Sequence[str]) -> str:
    """Return the first folder of ``places`` below ``root`` that contains class folders named by WordNet ID.

    Raises:
        DataError: No folder does.
    """
    for place in places:
        folder = os.path.join(root, place) if place else root
        if os.path.isdir(folder) and any(_is_synset(entry.name) for entry in os.scandir(folder)):
            return folder
    tried = ", ".join(place for place in places if place)
    raise DataError(
        f"{root}: no class folders of {name} (such as n01440764) here or in {tried}; unpack the archive of the data set here"
    )


def find_corruption_folders(root: str) -> dict[str, str]:
    """Map ``corruption/severity`` to its folder, for the 15 corruptions and for the extra ones that exist.

    Raises:
        DataError: One of the 75 folders is missing or has no class folders. The message names the first one.
    """
    found = {}
    for corruption in (*CORRUPTIONS, *EXTRA_CORRUPTIONS):
        places = [os.path.join(root, archive, corruption) for archive in ARCHIVES]
        at = next(filter(os.path.isdir, places), None)
        if at is None and corruption in EXTRA_CORRUPTIONS:
            continue
        if at is None:
            there = sum(any(map(os.path.isdir, (os.path.join(root, a, c) for a in ARCHIVES))) for c in CORRUPTIONS)
            raise DataError(f"{root}: {corruption} is missing; {there} of the {len(CORRUPTIONS)} corruptions exist")
        for severity in SEVERITIES:
            folder = os.path.join(at, str(severity))
            if not os.path.isdir(folder):
                raise DataError(
                    f"{folder}: no such folder; every corruption has the severities {SEVERITIES[0]} to {SEVERITIES[-1]}"
                )
            if not any(_is_synset(entry.name) for entry in os.scandir(folder)):
                raise DataError(f"{folder}: no class folders (such as n01440764)")
            found[f"{corruption}/{severity}"] = folder
    return found


def _part(name: str, source: str, chosen: EvaluationDataset, classes: Sequence[str] | None, outputs: int) -> DatasetPart:
    index, place = list_source(source), check_source(source).path
    if index.problems:
        raise DataError(f"{source}: {index.problems[0]}")
    if len(index.quarantined):
        where, cause = next(index.quarantined_images())
        raise DataError(
            f"{source}: {len(index.quarantined)} images cannot be read (the first: {where}: {cause}); a score needs all images"
        )
    labels = index.entries["label"]
    if (labels == NO_LABEL).any():
        raise DataError(f"{source}: {int((labels == NO_LABEL).sum())} of {len(index)} images have no label")
    numbers = _outputs(index, source, classes, outputs)
    if numbers is None and int(labels.max()) >= outputs:
        raise DataError(f"{source}: contains class {int(labels.max())}, but the model only has classes 0 to {outputs - 1}")
    if not os.path.isdir(place) or existing_index(source):  # else the listing has just seen the files
        _check_files(index, source)
    competing = _competing(index, numbers, chosen, classes) if chosen.own_classes_only else None
    return DatasetPart(name, index, numbers, competing, _empty_folders(place, index) if chosen.synsets else ())


def _check_files(index: Index, source: str) -> None:
    """Check that the files exist, because lists and indexes may name missing files."""
    with ThreadPoolExecutor(THREADS) as threads:
        there = threads.map(os.path.exists, index.shards)
        missing = [number for number, exists in enumerate(there) if not exists]
    if missing:
        first = escape_unprintable(index.shards[missing[0]])
        raise DataError(f"{source}: {first} is missing ({len(missing)} of {len(index.shards)} listed files are missing)")


def _empty_folders(place: str, index: Index) -> list[str]:
    if not os.path.isdir(place):
        return []
    with os.scandir(place) as entries:
        return sorted({entry.name for entry in entries if _is_synset(entry.name) and entry.is_dir()} - set(index.classes))


def _output_of_each(index: Index, numbers: Sequence[int] | None) -> NDArray[np.int64]:
    """Return the true output of each image, ``[N]``; ``numbers`` is as :attr:`DatasetPart.outputs`."""
    labels = index.entries["label"].astype(np.int64)
    return labels if numbers is None else np.asarray(numbers, np.int64)[labels]


def _competing(
    index: Index, numbers: Sequence[int] | None, chosen: EvaluationDataset, classes: Sequence[str] | None
) -> list[int]:
    """Return the outputs of the classes in the index, and of all published classes if the model has them."""
    published, known = chosen.published(index.classes), {name: number for number, name in enumerate(classes or ())}
    others = [known[name] for name in published] if known.keys() >= set(published) else []
    return sorted({*np.unique(_output_of_each(index, numbers)).tolist(), *others})


def _outputs(index: Index, source: str, classes: Sequence[str] | None, outputs: int) -> list[int] | None:
    """Return the output of each class of an index. Classes are matched by name where both sides have names."""
    if not index.classes:
        return None
    known = {name: number for number, name in enumerate(classes or ())}
    unknown = [name for name in index.classes if name not in known]
    if not unknown:
        return [known[name] for name in index.classes]
    if len(index.classes) == outputs and len(unknown) == outputs:
        return None  # as many classes as outputs, with other names: assume the order of training
    if not classes:
        raise DataError(
            f"{source}: {len(index.classes)} classes, but the model has {outputs}; give the name of each output, one per line, "
            "with --classes FILE"
        )
    raise DataError(
        f"{source}: the model has no class {unknown[0]} ({len(unknown)} of {len(index.classes)} classes are unknown to it)"
    )
