"""Rows of path and label, from class folders, lists and annotation files; and where well-known data sets keep these.

A layout only finds things: it resolves to class folders, a tar, a list or an annotation file, which ``sources`` then lists.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from scale_mae.data.errors import DataError

Row = tuple[str, str | None]  # path, label
Reader = Callable[[str], Iterable[Row]]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path")
LABEL_COLUMNS = ("label", "class", "category", "target")
_is_number = re.compile(r"-1|\d{1,9}").fullmatch


class SourceLocation(NamedTuple):
    """Where a source's images are told of.

    Attributes:
        path: class folders, a tar, a list or an annotation file.
        images: folder to which the paths of a list are relative; its own folder if empty.
        rows: reads the list where its suffix does not say how.
        classes: names of the class numbers of a list.
        problem: what is missing and can be done without.
    """

    path: str
    images: str = ""
    rows: Reader | None = None
    classes: Sequence[str] = ()
    problem: str = ""


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image; hidden ones, as macOS leaves them in archives, do not."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


# ---------------------------------------------------------------- folders, lists and annotation files


def folder_rows(root: str, classes: Iterable[str]) -> Iterator[Row]:
    """Images at any depth below the folders ``classes`` of ``root``, whose names are the labels. No file is touched.

    Raises:
        OSError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    prefix = os.path.join(root, "")
    for label in classes:
        for parent, below, files in os.walk(prefix + label, onerror=fail, followlinks=True):
            below[:] = sorted(name for name in below if not name.startswith("."))
            inside = parent.removeprefix(prefix)
            yield from ((f"{inside}/{name}", label) for name in sorted(files) if is_image(name))


def is_list(path: str) -> bool:
    """Whether :func:`read_rows` can read a file of this name."""
    return _suffix(path) in (*READERS, ".json")


def read_rows(place: SourceLocation) -> tuple[Iterable[Row], Sequence[str]]:
    """Rows of a list or an annotation file, and the names of its class numbers.

    Raises:
        DataError: malformed; also while the rows are read.
    """
    if _suffix(place.path) == ".json":
        return _annotation_rows(place.path)
    return (place.rows or READERS[_suffix(place.path)])(place.path), place.classes


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _text_rows(path: str) -> Iterator[Row]:
    """``path`` or ``path label``. A path may hold spaces: the last word is a label only if what stands there looks like it."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if "\0" in line:
                raise DataError(f"{path}, line {number}: not text; expected a path, or a path and a label, on each line")
            line = line.strip()  # noqa: PLW2901
            if not line or line.startswith("#"):
                continue
            words = line.rsplit(None, 1)
            named = not line.lower().endswith(IMAGE_SUFFIXES) and words[0].lower().endswith(IMAGE_SUFFIXES)
            yield (words[0], words[1]) if len(words) == 2 and (named or _is_number(words[1])) else (line, None)


def _table_rows(
    path: str, delimiter: str, path_columns: Sequence[str] = PATH_COLUMNS, label_columns: Sequence[str] = LABEL_COLUMNS
) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        rows: Iterator[list[str]] = (row for row in reader if any(row) and not row[0].startswith("#"))
        try:
            first = next(rows, [""])
            names = [name.strip().lower() for name in first]
            at = next((names.index(c) for c in path_columns if c in names), None)
            label_at = next((names.index(c) for c in label_columns if c in names), len(names))
            if at is None:
                if not names[0].endswith(IMAGE_SUFFIXES):
                    columns = ", ".join(path_columns)
                    raise DataError(f"{path}, line {reader.line_num}: no column named {columns}, and no image's path either")
                at, label_at, rows = 0, 1, itertools.chain([first], rows)
            for row in rows:
                if at >= len(row) or not row[at].strip() or "\0" in row[at]:
                    raise DataError(f"{path}, line {reader.line_num}: no path in column {at + 1}")
                yield row[at].strip(), row[label_at].strip() if label_at < len(row) else None
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: malformed ({error})") from None


READERS: dict[str, Reader] = {
    ".txt": _text_rows,
    ".csv": partial(_table_rows, delimiter=","),
    ".tsv": partial(_table_rows, delimiter="\t"),
}


def _annotation_rows(path: str) -> tuple[list[Row], list[str]]:
    """COCO style; labels where every annotated image has one category, and no boxes, as in iNaturalist."""
    expected = "expected images with id, file_name; annotations with image_id, category_id; categories with id, name"
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            data = json.load(file)
        images = {image["id"]: image["file_name"] for image in data["images"]}
        if not all(isinstance(name, str) for name in images.values()):
            raise TypeError("a file_name is not text")
        annotations, names = data.get("annotations", ()), {c["id"]: str(c["name"]) for c in data.get("categories", ())}
        if not all("category_id" in a and "bbox" not in a for a in annotations):
            return [(name, None) for name in images.values()], []
        category = {a["image_id"]: a["category_id"] for a in annotations}
        if not category or len(category) < len(annotations):
            return [(name, None) for name in images.values()], []
        rank = {identity: str(n) for n, identity in enumerate(sorted(names or set(category.values())))}
        label = {image: rank[identity] for image, identity in category.items()}
        return [(name, label.get(image)) for image, name in images.items()], [names[identity] for identity in sorted(names)]
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    except KeyError as error:
        raise DataError(f"{path}: {error} is missing; {expected}") from None
    except (TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: malformed ({error}); {expected}") from None
