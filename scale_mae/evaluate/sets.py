"""Sets that classifiers are measured on: where their images lie, what is missing, and which class is which output.

Robustness sets: ImageNet-C (Hendrycks & Dietterich 2019), -A (Hendrycks et al. 2021, natural adversarial examples), -R
(Hendrycks et al. 2021, renditions), -Sketch (Wang et al. 2019). Each keeps its images in folders named by WordNet id.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from timm.data import ImageNetInfo

from scale_mae.data.build import list_source
from scale_mae.data.index import SUFFIX, Index
from scale_mae.data.sources import NO_LABEL
from scale_mae.data.storage import DataError
from scale_mae.evaluate.robustness import CORRUPTIONS, EXTRA_CORRUPTIONS, SEVERITIES

ARCHIVES = ("", "noise", "blur", "weather", "digital", "extra")  # folders that ImageNet-C's archives may have been unpacked to
_is_synset = re.compile(r"n\d{8}").fullmatch


@dataclass(frozen=True)
class EvaluationSet:
    """One set.

    Attributes:
        images: how many the published set has (of ImageNet-C each severity of each corruption), in any of its editions.
        present: only classes that the set has are told apart: argmax over these.
        folders: below the root, where class folders named by WordNet id may lie; empty: a source is read instead.
        layout: the source, with ``{root}``.
    """

    images: Sequence[int] = ()
    present: bool = False
    folders: Sequence[str] = ()
    layout: str = ""


SETS: dict[str, EvaluationSet] = {
    "imagenet1k": EvaluationSet([50_000], layout="imagenet1k:val:{root}"),
    "imagenet_c": EvaluationSet([50_000]),
    "imagenet_a": EvaluationSet([7_500], present=True, folders=("", "imagenet-a")),
    "imagenet_r": EvaluationSet([30_000], present=True, folders=("", "imagenet-r")),
    "imagenet_sketch": EvaluationSet([50_000, 50_889], folders=("", "sketch", "imagenet-sketch", "ImageNet-Sketch")),
    "inat2017": EvaluationSet([95_986], layout="inat2017:val:{root}"),
    "inat2018": EvaluationSet([24_426], layout="inat2018:val:{root}"),
    "inat2019": EvaluationSet([3_030], layout="inat2019:val:{root}"),
    "places205": EvaluationSet([20_500], layout="places205:val:{root}"),
    "places365": EvaluationSet([36_500], layout="places365:val:{root}"),
    "folder": EvaluationSet(layout="{root}"),
}


@dataclass(frozen=True)
class Part:
    """A part of a set that is scored by itself.

    Attributes:
        name: of a part of ImageNet-C ``corruption/severity``, else of the set.
        index: its images.
        outputs: output of the model for each class number of the index; None: they are the same.
        present: only outputs of classes that are there compete.
    """

    name: str
    index: Index
    outputs: Sequence[int] | None
    present: bool

    def targets(self) -> tuple[NDArray[np.int64], list[int] | None]:
        """The right output of each image ``[N]``, as a position among the competing outputs, and these (None: all)."""
        labels = self.index.entries["label"].astype(np.int64)
        if self.outputs is not None:
            labels = np.asarray(self.outputs, np.int64)[labels]
        if not self.present:
            return labels, None
        competing = np.unique(labels)
        return np.searchsorted(competing, labels), competing.tolist()


def read_classes(source: str | None, outputs: int, known: Sequence[str] = ()) -> list[str] | None:
    """Name of each output of a model.

    Args:
        source: a text file with a name a line, or an index of the images it was trained on; None: what the weights tell,
            else of ImageNet's 1,000 the WordNet ids in alphabetical order, of others nothing is known.
        outputs: how many.
        known: what the weights tell; empty: nothing.

    Raises:
        DataError: not so many there.
    """
    if source is None and known:
        return list(known)
    if source is None:
        return list(ImageNetInfo("imagenet-1k").label_names()) if outputs == 1000 else None
    try:
        text = "" if source.endswith(SUFFIX) else Path(source).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--classes {source}: cannot be read ({error})") from None
    names = list(Index.open(source).classes) if source.endswith(SUFFIX) else text.split("\n")
    names = [name.strip() for name in names if name.strip()]
    if len(names) != outputs or len(set(names)) != outputs:
        raise DataError(f"--classes {source}: {len(set(names))} different names, but the model tells {outputs} classes apart")
    return names


def parts_of(name: str, root: str, classes: Sequence[str] | None, outputs: int) -> Iterator[Part]:
    """The parts of a set, each listed when it is its turn.

    Args:
        name: of :data:`SETS`.
        root: its folder; of ``folder`` any source.
        classes: from :func:`read_classes`.
        outputs: of the model.

    Raises:
        DataError: something is missing, has no label, or a class that the model does not know; before anything is scored
            where it can be seen without listing.
    """
    chosen = SETS[name]
    if name == "imagenet_c":
        for part, folder in corruption_folders(root).items():
            yield _part(part, list_source(folder), folder, chosen, classes, outputs)
    elif chosen.folders:
        folder = class_folders(root, name, chosen.folders)
        yield _part(name, list_source(folder), folder, chosen, classes, outputs)
    else:
        source = chosen.layout.format(root=root)
        yield _part(name, list_source(source), source, chosen, classes, outputs)


def class_folders(root: str, name: str, places: Sequence[str]) -> str:
    """The first of ``places`` below ``root`` that holds folders named by WordNet id.

    Raises:
        DataError: none does.
    """
    for place in places:
        folder = os.path.join(root, place) if place else root
        if os.path.isdir(folder) and any(_is_synset(entry.name) for entry in os.scandir(folder)):
            return folder
    tried = ", ".join(place for place in places if place)
    raise DataError(f"{root}: no class folders like n01440764 of {name} there or in {tried}; unpack its archive there")


def corruption_folders(root: str) -> dict[str, str]:
    """``corruption/severity`` -> folder, of the 15 corruptions and of those extra ones that are there.

    Raises:
        DataError: one of the 75 folders is missing or holds no class folders; names the first.
    """
    found = {}
    for corruption in (*CORRUPTIONS, *EXTRA_CORRUPTIONS):
        places = [os.path.join(root, archive, corruption) for archive in ARCHIVES]
        at = next(filter(os.path.isdir, places), None)
        if at is None and corruption in EXTRA_CORRUPTIONS:
            continue
        if at is None:
            there = sum(any(map(os.path.isdir, (os.path.join(root, a, c) for a in ARCHIVES))) for c in CORRUPTIONS)
            raise DataError(f"{root}: {corruption} is missing; {there} of the {len(CORRUPTIONS)} corruptions are there")
        for severity in SEVERITIES:
            folder = os.path.join(at, str(severity))
            if not os.path.isdir(folder):
                raise DataError(f"{folder}: missing; every corruption has the severities {SEVERITIES[0]} to {SEVERITIES[-1]}")
            if not any(_is_synset(entry.name) for entry in os.scandir(folder)):
                raise DataError(f"{folder}: no class folders like n01440764")
            found[f"{corruption}/{severity}"] = folder
    return found


def _part(name: str, index: Index, source: str, chosen: EvaluationSet, classes: Sequence[str] | None, outputs: int) -> Part:
    if index.problems:
        raise DataError(f"{source}: {index.problems[0]}")
    if len(index.quarantined):
        where, cause = next(index.left_out())
        raise DataError(f"{source}: {len(index.quarantined)} images cannot be used ({where}: {cause}); a score needs them all")
    labels = index.entries["label"]
    if (labels == NO_LABEL).any():
        raise DataError(f"{source}: {int((labels == NO_LABEL).sum())} of {len(index)} images have no label")
    numbers = _outputs(index, source, classes, outputs)
    if numbers is None and int(labels.max()) >= outputs:
        raise DataError(f"{source}: has class {int(labels.max())}, but the model tells only 0 to {outputs - 1} apart")
    return Part(name, index, numbers, chosen.present)


def _outputs(index: Index, source: str, classes: Sequence[str] | None, outputs: int) -> list[int] | None:
    """The output of each class of an index, by name where names are known on both sides."""
    if not index.classes:
        return None
    known = {name: number for number, name in enumerate(classes or ())}
    unknown = [name for name in index.classes if name not in known]
    if not unknown:
        return [known[name] for name in index.classes]
    if len(index.classes) == outputs and len(unknown) == outputs:
        return None  # as many as outputs, under names of their own: the order is that of training
    if not classes:
        told = f"{len(index.classes)} classes, the model tells {outputs} apart"
        raise DataError(f"{source}: {told}; say with --classes FILE which they are, one name a line")
    raise DataError(f"{source}: no output of the model is called {unknown[0]} ({len(unknown)} of {len(index.classes)} classes)")
