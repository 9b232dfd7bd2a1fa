"""Reads pairs of path and label from class folders, text lists, tables, and annotation files in COCO format."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from scale_mae.data.errors import DataError

Row = tuple[str, str | None]  # path, label
Reader = Callable[[str], Iterable[Row]]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path")
LABEL_COLUMNS = ("label", "class", "category", "target")
_is_number = re.compile(r"-1|\d{1,9}").fullmatch


def is_image(name: str) -> bool:
    """Whether a file name is the name of an image. Hidden files, such as those of macOS in archives, do not count."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def folder_rows(root: str, classes: Iterable[str]) -> Iterator[Row]:
    """Yield the images at any depth below the folders ``classes`` of ``root``. The label is the name of the class folder.

    Raises:
        OSError: A folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    prefix = os.path.join(root, "")
    for label in classes:
        for parent, folders, files in os.walk(prefix + label, onerror=fail, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            inside = parent.removeprefix(prefix)
            yield from ((f"{inside}/{name}", label) for name in sorted(files) if is_image(name))


def is_list(path: str) -> bool:
    """Whether the suffix of a path is one that :func:`read_rows` can read."""
    return _suffix(path) in (*READERS, ".json")


def read_rows(path: str, reader: Reader | None = None, classes: Sequence[str] = ()) -> tuple[Iterable[Row], Sequence[str]]:
    """Read a list or an annotation file.

    Args:
        path: The file.
        reader: Reads the file if its suffix does not determine its format.
        classes: Class names in the order of the class numbers, if the file contains numbers only.

    Returns:
        Rows, and the class names in the order of the class numbers.

    Raises:
        DataError: The file is malformed. This can also happen while the rows are consumed.
    """
    if _suffix(path) == ".json":
        return _annotation_rows(path)
    return (reader or READERS[_suffix(path)])(path), classes


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def text_rows(path: str) -> Iterator[Row]:
    """Yield the rows of a text file with ``path`` or ``path label`` on each line.

    A path may contain spaces. The last word counts as a label only if it is a number, or if the words before it end in an
    image suffix and the whole line does not.
    """
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if "\0" in line:
                raise DataError(f"{path}, line {number}: not text. Expected a path, or a path and a label, on each line.")
            line = line.strip()  # noqa: PLW2901
            if not line or line.startswith("#"):
                continue
            words = line.rsplit(None, 1)
            has_name = not line.lower().endswith(IMAGE_SUFFIXES) and words[0].lower().endswith(IMAGE_SUFFIXES)
            yield (words[0], words[1]) if len(words) == 2 and (has_name or _is_number(words[1])) else (line, None)


def table_rows(
    path: str, delimiter: str, path_columns: Sequence[str] = PATH_COLUMNS, label_columns: Sequence[str] = LABEL_COLUMNS
) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file. A file without a header has the path in column 1 and the label in column 2."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        rows: Iterator[list[str]] = (row for row in reader if any(row) and not row[0].startswith("#"))
        try:
            first = next(rows, [""])
            names = [name.strip().lower() for name in first]
            path_at = next((names.index(c) for c in path_columns if c in names), None)
            label_at = next((names.index(c) for c in label_columns if c in names), len(names))
            if path_at is None:
                if not names[0].endswith(IMAGE_SUFFIXES):
                    raise DataError(
                        f"{path}, line {reader.line_num}: no column named {', '.join(path_columns)}, and the first column does "
                        "not contain an image path. Add a header line."
                    )
                path_at, label_at, rows = 0, 1, itertools.chain([first], rows)
            for row in rows:
                if path_at >= len(row) or not row[path_at].strip() or "\0" in row[path_at]:
                    raise DataError(f"{path}, line {reader.line_num}: no path in column {path_at + 1}. Correct the line.")
                yield row[path_at].strip(), row[label_at].strip() if label_at < len(row) else None
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: malformed ({error}). Correct the line.") from None


READERS: dict[str, Reader] = {
    ".txt": text_rows,
    ".csv": partial(table_rows, delimiter=","),
    ".tsv": partial(table_rows, delimiter="\t"),
}


def _annotation_rows(path: str) -> tuple[list[Row], list[str]]:
    """Read annotations in COCO format.

    Images get a label if every annotation has a category and no box, and every image has at most one annotation, as in
    iNaturalist. Otherwise no image gets a label.
    """
    expected = "Expected images with id and file_name, annotations with image_id and category_id, categories with id and name."
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
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}). Correct the file.") from None
    except KeyError as error:
        raise DataError(f"{path}: {error} is missing. {expected}") from None
    except (TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: malformed ({error}). {expected}") from None
