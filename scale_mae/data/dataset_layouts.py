"""Where well-known data sets keep their images and labels."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from scale_mae.data.errors import DataError
from scale_mae.data.file_lists import Row, SourceLocation, _table_rows, _text_rows

is_synset = re.compile(r"n\d{8}(\.tar)?").fullmatch


def locate(source: str) -> SourceLocation | None:
    """Find what a source ``INDEX_NAME:SPLIT:ROOT`` needs; None if it names no layout.

    Raises:
        DataError: unknown split, or something is missing.
    """
    name, _, rest = source.partition(":")
    if name not in LAYOUTS:
        return None
    splits, find = LAYOUTS[name]
    split, _, root = rest.partition(":")
    if split not in splits:
        raise DataError(f"{source}: {name} has no split {split!r}; write {name}:SPLIT:ROOT with one of {', '.join(splits)}")
    if not os.path.isdir(root):
        raise DataError(f"{root or source}: no such folder; write {name}:{split}:ROOT with the folder of {name}")
    return find(root, split)


def _find(root: str, what: str, *names: str) -> str:
    """The first of ``names`` below ``root`` that exists."""
    if found := _is_there(root, *names):
        return found
    raise DataError(f"{root}: {what} missing; put there {' or '.join(names)}")


def _is_there(root: str, *names: str) -> str | None:
    return next(filter(os.path.exists, (os.path.join(root, name) for name in names)), None)


def _imagenet1k(root: str, split: str) -> SourceLocation:
    kaggle = f"ILSVRC/Data/CLS-LOC/{split}"
    if split == "train":
        return SourceLocation(_find(root, "training images are", "train", kaggle, "ILSVRC2012_img_train.tar"))
    images = _find(root, "validation images are", "val", kaggle)
    with os.scandir(images) as entries:
        if any(is_synset(entry.name) for entry in entries):
            return SourceLocation(images)
    if solution := _is_there(root, "LOC_val_solution.csv", "val/LOC_val_solution.csv"):
        return SourceLocation(solution, images, _kaggle_rows)
    if labels := _is_there(root, "val_map.txt", "val.txt", "val/val_map.txt", "val/val.txt"):
        return SourceLocation(labels, images)
    # The devkit's ILSVRC2012_validation_ground_truth.txt is of no use: it numbers the classes by ILSVRC2012_ID, which is not
    # the alphabetical order of the synsets; only the devkit's meta.mat tells which is which.
    return SourceLocation(
        images, problem=f"{root}: no labels of the validation images; put there LOC_val_solution.csv or val_map.txt"
    )


def _kaggle_rows(path: str) -> Iterator[Row]:
    """``ILSVRC2012_val_00048981,n03995372 85 1 499 272``: image and its synset, followed by a box."""
    for name, synset in _table_rows(path, ",", ("imageid",), ("predictionstring",)):
        yield f"{name}.JPEG", synset and synset.split()[0]


def _imagenet21k(root: str, split: str) -> SourceLocation:
    names = ("train", "imagenet21k_train", "winter21_whole", "")  # the folders of the processed and of the original archive
    for folder in filter(os.path.isdir, (os.path.join(root, name) for name in names)):
        with os.scandir(folder) as entries:
            if any(is_synset(entry.name) for entry in entries):
                return SourceLocation(folder)
    raise DataError(f"{root}: class folders or tars like n01440764 are missing, also in {', '.join(names[:-1])}; unpack them")


def _inaturalist(year: int, root: str, split: str) -> SourceLocation:
    return SourceLocation(_find(root, "annotations are", f"{split}{year}.json"), root)


def _places205(root: str, split: str) -> SourceLocation:
    lists = [f"trainvalsplit_places205/{split}_places205.csv", f"{split}_places205.csv"]
    if split == "test":  # its archive holds a folder of images and no list
        lists += ["testSet_resize", "testSetPlaces205_resize/testSet_resize"]
    path = _find(root, f"the list of the {split} images is", *lists)
    if os.path.isdir(path):
        return SourceLocation(path)
    images = _find(root, "images are", "data/vision/torralba/deeplearning/images256", "images256")
    return SourceLocation(path, images, _text_rows)  # separated by spaces in spite of its suffix


def _places365(root: str, split: str) -> SourceLocation:
    def lists(name: str) -> tuple[str, str]:
        return name, f"filelist_places365-standard/{name}"

    path = _find(root, f"the list of the {split} images is", *lists(f"places365_{split}{'_standard' * (split == 'train')}.txt"))
    archives = ("data_256_standard", "data_large_standard", "data_256", "data_large")
    images = _find(root, f"{split} images are", *(archives if split == "train" else ("val_256", "val_large")))
    classes: list[str] = []
    if categories := _is_there(root, *lists("categories_places365.txt")):
        numbered = list(_text_rows(categories))
        if [label for _, label in numbered] != [str(n) for n in range(len(numbered))]:
            raise DataError(f"{categories}: malformed; expected lines like '/a/airfield 0', numbered from 0")
        classes = [name for name, _ in numbered]
    return SourceLocation(path, images, _rooted_rows, classes)


def _rooted_rows(path: str) -> Iterator[Row]:
    """``/a/airfield/00000001.jpg 0``: the slash stands for the folder of the images."""
    return ((name.lstrip("/"), label) for name, label in _text_rows(path))


def _coco(root: str, split: str) -> SourceLocation:
    names = [f"annotations/{kind}_{split}.json" for kind in ("instances", "image_info", "captions")]
    folder = split.replace("-dev", "")
    return SourceLocation(_find(root, "annotations are", *names), _find(root, "images are", folder, f"images/{folder}"))


COCO_2014 = ("train2014", "val2014", "test2014", "test2015", "test-dev2015")
COCO_2017 = ("train2017", "val2017", "test2017", "test-dev2017", "unlabeled2017")
THREE = ("train", "val", "test")
LAYOUTS: dict[str, tuple[Sequence[str], Callable[[str, str], SourceLocation]]] = {
    "imagenet1k": (("train", "val"), _imagenet1k),
    "imagenet21k": (("train",), _imagenet21k),
    "inat2017": (THREE, partial(_inaturalist, 2017)),
    "inat2018": (THREE, partial(_inaturalist, 2018)),
    "inat2019": (THREE, partial(_inaturalist, 2019)),
    "places205": (THREE, _places205),
    "places365": (("train", "val"), _places365),
    "coco": ((*COCO_2014, *COCO_2017), _coco),
}
