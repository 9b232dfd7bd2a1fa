"""Lists the images of a source: class folders, tar shards, file lists, annotation files, or the layout of a known data set.

To add a kind of source, add it to :func:`_list` and :func:`~scale_mae.data.source_check.check_source`. To add a known data
set, add it to :data:`scale_mae.data.dataset_layouts.LAYOUTS`. ``scale-mae sources``
prints ``SOURCE_KINDS`` of ``data/command.py``.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool

from scale_mae.data.dataset_layouts import SourceLocation
from scale_mae.data.errors import DataError, escape_unprintable
from scale_mae.data.file_lists import Row, folder_rows, is_image, is_list, read_rows
from scale_mae.data.image_list import ImageList, assign_class_numbers, provisional_label
from scale_mae.data.source_check import TAR_SUFFIXES, check_source, is_shards, shard_paths
from scale_mae.data.tar_shards import list_shards


def list_images(source: str) -> ImageList:
    """List the images of a source in a fixed order. No image is opened.

    Args:
        source: One of

            - class folders ``root/class/.../image``, or a folder of images;
            - tar shards in the WebDataset convention (``key.jpg`` next to ``key.cls``): a folder of shards, one shard, a
              brace list ``name-{000..146}.tar``, ``demo:train`` or ``demo:val``;
            - a list of paths and labels: ``.txt``, ``.csv`` or ``.tsv``;
            - annotations in COCO format: ``.json``;
            - the layout of a known data set: ``NAME:SPLIT:ROOT``, see :data:`scale_mae.data.dataset_layouts.LAYOUTS`.

    Raises:
        DataError: The source is missing, incomplete, unreadable, malformed or empty.
    """
    try:
        location = check_source(source)
        images = _list(location)
        images.problems += [location.problem] if location.problem else []
    except BrokenProcessPool:
        raise DataError(
            f"{escape_unprintable(source)}: a process that listed shards was killed. Check that there is enough memory."
        ) from None
    except OSError as error:
        raise DataError(
            escape_unprintable(f"{error.filename or source}: cannot be read ({error.strerror or error}).")
        ) from None
    except DataError as error:
        raise DataError(escape_unprintable(str(error))) from None
    images.problems = [escape_unprintable(problem) for problem in images.problems]
    if not images:
        reason = images.problems[0] if images.problems else "Expected root/class/*.jpg, or tar shards of key.jpg and key.cls."
        raise DataError(f"{escape_unprintable(source)}: no images found. {reason}")
    return images


def _list(location: SourceLocation) -> ImageList:
    path = location.path
    if os.path.isdir(path):
        return _list_folder(os.path.abspath(path))
    if is_shards(path):
        return list_shards(shard_paths(path))
    if is_list(path):
        return _list_rows(location)
    raise DataError(
        f"{path}: not a source of images. Expected a folder, tar shards, a list (.txt, .csv, .tsv) or annotations (.json)."
    )


def _list_folder(root: str) -> ImageList:
    with os.scandir(root) as scanned:
        entries = sorted((entry.name, entry.is_dir()) for entry in scanned if not entry.name.startswith("."))
    folders = [name for name, is_folder in entries if is_folder]
    files = [name for name, is_folder in entries if not is_folder]
    shards = [name for name in files if name.endswith(TAR_SUFFIXES)]
    images = [name for name in files if is_image(name)]
    if not shards:
        rows = itertools.chain(((name, None) for name in images), folder_rows(root, folders))
        return _list_files(root, rows, keep_integers=False)
    listed = list_shards([os.path.join(root, name) for name in shards])
    if folders or images:
        listed.problems.append(f"{root}: contains tar shards, so {len(folders)} folders and {len(images)} images are skipped")
    return listed


def _list_rows(location: SourceLocation) -> ImageList:
    rows, classes = read_rows(location.path, location.reader, location.classes)
    # resolve links first: behind a link to the folder, ".." would lead elsewhere
    root = os.path.realpath(location.image_root or os.path.dirname(location.path))
    images = _list_files(root, rows, classes)
    samples = [os.path.join(root, images.shards[i]) for i in (0, len(images) // 2, -1) if len(images)]
    if samples and not any(map(os.path.exists, samples)):
        raise DataError(
            f"{samples[0]}: no such image. The paths in {location.path} are relative to {root}. Check that they exist."
        )
    return images


def _list_files(root: str, rows: Iterable[Row], classes: Sequence[str] = (), *, keep_integers: bool = True) -> ImageList:
    images, prefix = ImageList(root), os.path.join(root, "")
    names: dict[str, int] = {}
    for path, label in rows:
        if not os.path.basename(path).startswith("."):
            # add_shard also makes other absolute paths relative, but it is slower
            images.add_image(images.add_shard(path.removeprefix(prefix)), 0, 0, provisional_label(label, names))
    assign_class_numbers(images, list(names), classes, keep_integers=keep_integers)
    return images
