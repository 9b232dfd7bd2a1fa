"""Sets that classifiers are measured on: where their images lie, what is missing, and which class is which output.

Robustness sets: ImageNet-C (Hendrycks & Dietterich 2019), -A (Hendrycks et al. 2021, natural adversarial examples), -R
(Hendrycks et al. 2021, renditions), -Sketch (Wang et al. 2019). Each keeps its images in folders named by WordNet id.
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
from scale_mae.evaluation.robustness import CORRUPTIONS, EXTRA_CORRUPTIONS, SEVERITIES

ARCHIVES = ("", "noise", "blur", "weather", "digital", "extra")  # folders that ImageNet-C's archives may have been unpacked to
THREADS = 16  # that ask storage whether files are there
_is_synset = re.compile(r"n\d{8}").fullmatch


@dataclass(frozen=True)
class EvaluationSet:
    """One set.

    Attributes:
        images: how many the published set has (of ImageNet-C each severity of each corruption), in any of its editions.
        synsets: whose WordNet ids the published classes are, see :func:`synsets`; empty: they are not known.
        own: only the set's own classes are told apart: argmax over these.
        folders: below the root, where class folders named by WordNet id may lie; empty: a source is read instead.
        layout: the source, with ``{root}``.
    """

    images: Sequence[int] = ()
    synsets: str = ""
    own: bool = False
    folders: Sequence[str] = ()
    layout: str = ""

    def published(self, names: Collection[str]) -> Sequence[str]:
        """The published classes; none if they are not known, or if the set's ``names`` of classes are all of another kind."""
        known = synsets(self.synsets) if self.synsets else ()
        return () if set(names).isdisjoint(known) else known


SETS: dict[str, EvaluationSet] = {
    "imagenet1k": EvaluationSet([50_000], "imagenet", layout="imagenet1k:val:{root}"),
    "imagenet_c": EvaluationSet([50_000], "imagenet"),
    "imagenet_a": EvaluationSet([7_500], "imagenet_a", own=True, folders=("", "imagenet-a")),
    "imagenet_r": EvaluationSet([30_000], "imagenet_r", own=True, folders=("", "imagenet-r")),
    "imagenet_sketch": EvaluationSet(
        [50_000, 50_889], "imagenet", folders=("", "sketch", "imagenet-sketch", "ImageNet-Sketch")
    ),
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
        competing: the outputs that compete, ascending; None: all.
        empty: class folders without images.
    """

    name: str
    index: Index
    outputs: Sequence[int] | None
    competing: Sequence[int] | None
    empty: Sequence[str] = ()

    def targets(self) -> tuple[NDArray[np.int64], list[int] | None]:
        """The right output of each image ``[N]``, as a position among the competing outputs, and these (None: all)."""
        labels = _output_of_each(self.index, self.outputs)
        if self.competing is None:
            return labels, None
        return np.searchsorted(self.competing, labels), list(self.competing)


@functools.cache
def synsets(name: str) -> tuple[str, ...]:
    """WordNet ids in alphabetical order, from timm's lists: 1,000 of ``imagenet``, 200 of ``imagenet_a`` and ``imagenet_r``."""
    return tuple(resources.files("timm.data").joinpath(f"_info/{name}_synsets.txt").read_text("utf-8").split())


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
        return list(synsets("imagenet")) if outputs == 1000 else None
    try:
        text = "" if source.endswith(INDEX_SUFFIX) else Path(source).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--classes {source}: cannot be read ({error})") from None
    names = list(Index.open(source).classes) if source.endswith(INDEX_SUFFIX) else text.split("\n")
    names = [name.strip() for name in names if name.strip()]
    if len(names) != outputs or len(set(names)) != outputs:
        raise DataError(f"--classes {source}: {len(set(names))} different names, but the model tells {outputs} classes apart")
    return names


def parts_of(name: str, root: str, classes: Sequence[str] | None, outputs: int) -> list[Part]:
    """The parts of a set, all of them listed.

    Args:
        name: of :data:`SETS`.
        root: its folder; of ``folder`` any source.
        classes: from :func:`read_classes`.
        outputs: of the model.

    Raises:
        DataError: something is missing or empty, has no label, or a class that the model does not know.
    """
    chosen = SETS[name]
    if name == "imagenet_c":
        sources = corruption_folders(root)
    elif chosen.folders:
        sources = {name: class_folders(root, name, chosen.folders)}
    else:
        sources = {name: chosen.layout.format(root=root)}
    return [_part(part, source, chosen, classes, outputs) for part, source in sources.items()]


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


def _part(name: str, source: str, chosen: EvaluationSet, classes: Sequence[str] | None, outputs: int) -> Part:
    index, place = list_source(source), check_source(source).path
    if index.problems:
        raise DataError(f"{source}: {index.problems[0]}")
    if len(index.quarantined):
        where, cause = next(index.quarantined_images())
        raise DataError(f"{source}: {len(index.quarantined)} images cannot be used ({where}: {cause}); a score needs them all")
    labels = index.entries["label"]
    if (labels == NO_LABEL).any():
        raise DataError(f"{source}: {int((labels == NO_LABEL).sum())} of {len(index)} images have no label")
    numbers = _outputs(index, source, classes, outputs)
    if numbers is None and int(labels.max()) >= outputs:
        raise DataError(f"{source}: has class {int(labels.max())}, but the model tells only 0 to {outputs - 1} apart")
    if not os.path.isdir(place) or existing_index(source):  # else the files were seen a moment ago
        _check_files(index, source)
    competing = _competing(index, numbers, chosen, classes) if chosen.own else None
    return Part(name, index, numbers, competing, _empty_folders(place, index) if chosen.synsets else ())


def _check_files(index: Index, source: str) -> None:
    """Lists and indexes may name files that are not there."""
    with ThreadPoolExecutor(THREADS) as threads:
        there = threads.map(os.path.exists, index.shards)
        missing = [number for number, exists in enumerate(there) if not exists]
    if missing:
        first = escape_unprintable(index.shards[missing[0]])
        raise DataError(f"{source}: {first} is missing ({len(missing)} of {len(index.shards)} files that it tells of)")


def _empty_folders(place: str, index: Index) -> list[str]:
    if not os.path.isdir(place):
        return []
    with os.scandir(place) as entries:
        return sorted({entry.name for entry in entries if _is_synset(entry.name) and entry.is_dir()} - set(index.classes))


def _output_of_each(index: Index, numbers: Sequence[int] | None) -> NDArray[np.int64]:
    """The right output of each image, ``[N]``; ``numbers`` as :attr:`Part.outputs`."""
    labels = index.entries["label"].astype(np.int64)
    return labels if numbers is None else np.asarray(numbers, np.int64)[labels]


def _competing(index: Index, numbers: Sequence[int] | None, chosen: EvaluationSet, classes: Sequence[str] | None) -> list[int]:
    """Outputs of the classes that are there, and of all published ones, if the model knows these."""
    published, known = chosen.published(index.classes), {name: number for number, name in enumerate(classes or ())}
    others = [known[name] for name in published] if known.keys() >= set(published) else []
    return sorted({*np.unique(_output_of_each(index, numbers)).tolist(), *others})


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
