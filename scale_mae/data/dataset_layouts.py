"""Layouts of known data sets: where ImageNet, iNaturalist, Places and COCO keep their images and labels.

A layout is written ``NAME:SPLIT:ROOT``. It only finds paths: it resolves to class folders, a tar, a list or an annotation
file, which :mod:`scale_mae.data.sources` then lists. To add a layout, write a function and add it to :data:`LAYOUTS`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from scale_mae.data.errors import DataError
from scale_mae.data.file_lists import Reader, Row, table_rows, text_rows

is_synset = re.compile(r"n\d{8}(\.tar)?").fullmatch


class SourceLocation(NamedTuple):
    """Where the images of a source are.

    Attributes:
        path: Class folders, tar shards, a list or an annotation file.
        image_root: Folder to which the paths in a list are relative; empty means the folder of the list.
        reader: Reads the list if its suffix does not determine its format.
        classes: Class names in the order of the class numbers in a list.
        problem: Something optional that is missing, as a message.
    """

    path: str
    image_root: str = ""
    reader: Reader | None = None
    classes: Sequence[str] = ()
    problem: str = ""


def resolve_layout(source: str) -> SourceLocation | None:
    """Resolve ``NAME:SPLIT:ROOT``. Return ``None`` if ``NAME`` is not a layout.

    Raises:
        DataError: The split is unknown, or a file or folder is missing.
    """
    name, _, rest = source.partition(":")
    if name not in LAYOUTS:
        return None
    splits, resolve = LAYOUTS[name]
    split, _, root = rest.partition(":")
    if split not in splits:
        raise DataError(f"{source}: {name} has no split {split!r}. Write {name}:SPLIT:ROOT with one of {', '.join(splits)}.")
    if not os.path.isdir(root):
        raise DataError(f"{root or source}: no such folder. Write {name}:{split}:ROOT with the folder of {name}.")
    return resolve(root, split)


def _require(root: str, what: str, *names: str) -> str:
    """Return the first of ``names`` that exists below ``root``."""
    if path := _find(root, *names):
        return path
    raise DataError(f"{root}: {what} missing. Put {' or '.join(names)} there.")


def _find(root: str, *names: str) -> str | None:
    return next(filter(os.path.exists, (os.path.join(root, name) for name in names)), None)


def _imagenet1k(root: str, split: str) -> SourceLocation:
    kaggle = f"ILSVRC/Data/CLS-LOC/{split}"
    if split == "train":
        return SourceLocation(_require(root, "training images are", "train", kaggle, "ILSVRC2012_img_train.tar"))
    images = _require(root, "validation images are", "val", kaggle)
    with os.scandir(images) as entries:
        if any(is_synset(entry.name) for entry in entries):
            return SourceLocation(images)
    if solution := _find(root, "LOC_val_solution.csv", "val/LOC_val_solution.csv"):
        return SourceLocation(solution, images, _kaggle_rows)
    if labels := _find(root, "val_map.txt", "val.txt", "val/val_map.txt", "val/val.txt"):
        return SourceLocation(labels, images)
    # ILSVRC2012_validation_ground_truth.txt of the devkit does not help. It numbers the classes by ILSVRC2012_ID, which is
    # not the alphabetical order of the synsets. Only meta.mat of the devkit maps one to the other.
    problem = f"{root}: no labels of the validation images. Put LOC_val_solution.csv or val_map.txt there."
    return SourceLocation(images, problem=problem)


def _kaggle_rows(path: str) -> Iterator[Row]:
    """Yield the rows of lines like ``ILSVRC2012_val_00048981,n03995372 85 1 499 272``: image, then its synset and a box."""
    for name, synset in table_rows(path, ",", ("imageid",), ("predictionstring",)):
        yield f"{name}.JPEG", synset and synset.split()[0]


def _imagenet21k(root: str, split: str) -> SourceLocation:
    names = ("train", "imagenet21k_train", "winter21_whole", "")  # the folders of the processed and of the original archive
    for folder in filter(os.path.isdir, (os.path.join(root, name) for name in names)):
        with os.scandir(folder) as entries:
            if any(is_synset(entry.name) for entry in entries):
                return SourceLocation(folder)
    raise DataError(
        f"{root}: class folders or class tars such as n01440764 are missing, also in {', '.join(names[:-1])}. "
        "Unpack the archive there."
    )


def _inaturalist(year: int, root: str, split: str) -> SourceLocation:
    return SourceLocation(_require(root, "annotations are", f"{split}{year}.json"), root)


def _places205(root: str, split: str) -> SourceLocation:
    lists = [f"trainvalsplit_places205/{split}_places205.csv", f"{split}_places205.csv"]
    if split == "test":  # its archive contains a folder of images and no list
        lists += ["testSet_resize", "testSetPlaces205_resize/testSet_resize"]
    path = _require(root, f"the list of the {split} images is", *lists)
    if os.path.isdir(path):
        return SourceLocation(path)
    images = _require(root, "images are", "data/vision/torralba/deeplearning/images256", "images256")
    return SourceLocation(path, images, text_rows)  # the columns are separated by spaces in spite of the suffix .csv


def _places365(root: str, split: str) -> SourceLocation:
    def lists(name: str) -> tuple[str, str]:
        return name, f"filelist_places365-standard/{name}"

    name = f"places365_{split}{'_standard' * (split == 'train')}.txt"
    path = _require(root, f"the list of the {split} images is", *lists(name))
    archives = ("data_256_standard", "data_large_standard", "data_256", "data_large")
    images = _require(root, f"{split} images are", *(archives if split == "train" else ("val_256", "val_large")))
    classes: list[str] = []
    if categories := _find(root, *lists("categories_places365.txt")):
        numbered = list(text_rows(categories))
        if [label for _, label in numbered] != [str(n) for n in range(len(numbered))]:
            raise DataError(f"{categories}: malformed. Expected lines like '/a/airfield 0', numbered from 0.")
        classes = [name for name, _ in numbered]
    return SourceLocation(path, images, _rooted_rows, classes)


def _rooted_rows(path: str) -> Iterator[Row]:
    """Yield the rows of lines like ``/a/airfield/00000001.jpg 0``. The leading slash means the folder of the images."""
    return ((name.lstrip("/"), label) for name, label in text_rows(path))


def _coco(root: str, split: str) -> SourceLocation:
    names = [f"annotations/{kind}_{split}.json" for kind in ("instances", "image_info", "captions")]
    folder = split.replace("-dev", "")
    annotations = _require(root, "annotations are", *names)
    return SourceLocation(annotations, _require(root, "images are", folder, f"images/{folder}"))


COCO_2014 = ("train2014", "val2014", "test2014", "test2015", "test-dev2015")
COCO_2017 = ("train2017", "val2017", "test2017", "test-dev2017", "unlabeled2017")
TRAIN_VAL_TEST = ("train", "val", "test")
LAYOUTS: dict[str, tuple[Sequence[str], Callable[[str, str], SourceLocation]]] = {  # name -> splits, resolver
    "imagenet1k": (("train", "val"), _imagenet1k),
    "imagenet21k": (("train",), _imagenet21k),
    "inat2017": (TRAIN_VAL_TEST, partial(_inaturalist, 2017)),
    "inat2018": (TRAIN_VAL_TEST, partial(_inaturalist, 2018)),
    "inat2019": (TRAIN_VAL_TEST, partial(_inaturalist, 2019)),
    "places205": (TRAIN_VAL_TEST, _places205),
    "places365": (("train", "val"), _places365),
    "coco": ((*COCO_2014, *COCO_2017), _coco),
}
