"""What a source holds: class folders, tar shards, lists, annotation files, or a well-known layout of these."""

from __future__ import annotations

import io
import itertools
import os
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import IO

import numpy as np

from scale_mae.data.errors import DataError, ImageError, escape_unprintable
from scale_mae.data.file_lists import Row, SourceLocation, folder_rows, is_image, is_list, read_rows
from scale_mae.data.source_check import TAR_SUFFIXES, are_shards, check_source, shard_paths
from scale_mae.data.storage import decompress
from scale_mae.system.process_pool import start_process_pool

NO_LABEL = -1
CLASSES = "classes.txt"  # beside shards: the name of each class number
LONGEST_TAIL = 1 << 20  # bytes of zeros at a tar's end that its blocking can explain
PROCESSES = 16  # that list shards, where there are so many


class ImageList:
    """Images found in a source and not yet looked at, in columns, because there may be tens of millions.

    Attributes:
        root: absolute folder to which the shards' paths are relative.
        shards: relative paths; an image file that is no tar shard is its own shard.
        shard, offset, length: where each image's bytes are; length 0 is a whole file.
        label: class number of each image, or :data:`NO_LABEL`.
        classes: names of the class numbers, possibly empty.
        problems: what could not be listed, one line each.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = os.path.abspath(root)
        self.shards: list[str] = []
        self.shard, self.offset, self.length, self.label = array("I"), array("Q"), array("I"), array("i")
        self.classes: list[str] = []
        self.problems: list[str] = []

    def __len__(self) -> int:
        return len(self.shard)

    def add_shard(self, path: str) -> int:
        """Its number; ``path`` is absolute or relative to the root."""
        self.shards.append(os.path.relpath(path, self.root) if os.path.isabs(path) else path)
        return len(self.shards) - 1

    def add(self, shard: int, offset: int, length: int, label: int) -> None:
        """One more image."""
        self.shard.append(shard)
        self.offset.append(offset)
        self.length.append(length)
        self.label.append(label)


def list_images(source: str) -> ImageList:
    """List the images of a source, in a fixed order; none of them is opened.

    Args:
        source: class folders ``root/class/.../image`` or a flat folder; tar shards in the WebDataset convention (``key.jpg``
            beside ``key.cls``): a folder of them, one, a brace list ``name-{000..146}.tar``, or ``demo:train``, ``demo:val``;
            a list ``.txt``, ``.csv`` or ``.tsv`` of paths and labels; annotations ``.json`` in COCO style; or a layout
            ``INDEX_NAME:SPLIT:ROOT``, see :data:`scale_mae.data.dataset_layouts.LAYOUTS`.

    Raises:
        DataError: nothing there, something missing, unreadable or malformed.
    """
    try:
        place = check_source(source)
        listing = _list(place)
        listing.problems += [place.problem] if place.problem else []
    except BrokenProcessPool:
        raise DataError(
            f"{escape_unprintable(source)}: a process that listed shards was killed; is there enough memory?"
        ) from None
    except OSError as error:
        raise DataError(escape_unprintable(f"{error.filename or source}: cannot be read ({error.strerror or error})")) from None
    except DataError as error:
        raise DataError(escape_unprintable(str(error))) from None
    listing.problems = [escape_unprintable(problem) for problem in listing.problems]
    if not listing:
        why = listing.problems[0] if listing.problems else "expected root/class/*.jpg, or tar shards of key.jpg and key.cls"
        raise DataError(f"{escape_unprintable(source)}: no images found; {why}")
    return listing


def _list(place: SourceLocation) -> ImageList:
    path = place.path
    if os.path.isdir(path):
        return _list_folder(os.path.abspath(path))
    if are_shards(path):
        return _list_shards(shard_paths(path))
    if is_list(path):
        return _list_rows(place)
    raise DataError(f"{path}: no kind of source; expected a folder, tar shards, a list .txt .csv .tsv or annotations .json")


def _list_folder(root: str) -> ImageList:
    with os.scandir(root) as found:
        entries = sorted((entry.name, entry.is_dir()) for entry in found if not entry.name.startswith("."))
    folders = [name for name, is_folder in entries if is_folder]
    files = [name for name, is_folder in entries if not is_folder]
    shards = [name for name in files if name.endswith(TAR_SUFFIXES)]
    images = [name for name in files if is_image(name)]
    if not shards:
        rows = itertools.chain(((name, None) for name in images), folder_rows(root, folders))
        return _collect(root, rows, integers=False)
    listing = _list_shards([os.path.join(root, name) for name in shards])
    if folders or images:
        listing.problems.append(f"{root}: {len(folders)} folders and {len(images)} images beside tar shards are left out")
    return listing


def _list_rows(place: SourceLocation) -> ImageList:
    rows, classes = read_rows(place)
    root = os.path.realpath(place.images or os.path.dirname(place.path))  # from a link to it, ".." would lead elsewhere
    listing = _collect(root, rows, classes)
    some = [os.path.join(root, listing.shards[i]) for i in (0, len(listing) // 2, -1) if len(listing)]
    if some and not any(map(os.path.exists, some)):
        raise DataError(f"{some[0]}: no such image; {place.path} is a list of images relative to {root}, are they there?")
    return listing


def _collect(root: str, rows: Iterable[Row], classes: Sequence[str] = (), *, integers: bool = True) -> ImageList:
    listing, prefix = ImageList(root), os.path.join(root, "")
    names: dict[str, int] = {}
    for path, name in rows:
        if not os.path.basename(path).startswith("."):
            # add_shard makes other absolute paths relative too, but takes its time
            listing.add(listing.add_shard(path.removeprefix(prefix)), 0, 0, _numbered(name, names))
    _number_classes(listing, list(names), classes, integers=integers)
    return listing


def _numbered(name: str | None, names: dict[str, int]) -> int:
    """The label of this name, by first appearance; there may be millions of rows, so names are put in order at the end."""
    return NO_LABEL if name is None or name in {"", "-1"} else names.setdefault(name, len(names))


def _number_classes(listing: ImageList, names: Sequence[str], classes: Sequence[str], *, integers: bool = True) -> None:
    """Replace labels, until now numbers of ``names``: integers stand as they are, names in alphabetical or the given order."""
    odd = [name for name in names if not re.fullmatch(r"\d{1,9}", name)]
    if integers and 0 < len(odd) < len(names):
        listing.problems.append(f"{listing.root}: labels are numbers but for {odd[0]} ({len(odd)} in all); taken as names")
    if integers and not odd:
        known = {name: int(name) for name in names if not classes or int(name) < len(classes)}
    else:
        classes = classes or sorted(names)
        known = {name: number for number, name in enumerate(classes)}
    listing.classes = list(classes)
    listing.label = _renumbered(listing.label, [known.get(name, NO_LABEL) for name in names])
    if unknown := [name for name in names if name not in known]:
        listing.problems.append(f"{listing.root}: labels left out that name no class: {unknown[0]} ({len(unknown)} in all)")


def _renumbered(labels: array[int], numbers: Sequence[int]) -> array[int]:
    table = np.array([*numbers, NO_LABEL], np.int32)  # NO_LABEL is -1, the last
    return array("i", table[np.asarray(labels)].tobytes())


def _list_shards(paths: Sequence[str]) -> ImageList:
    listing = ImageList(os.path.commonpath([os.path.dirname(path) for path in paths]))
    names: dict[str, int] = {}
    for path, part in zip(paths, _list_each(paths), strict=True):
        listing.shard.extend(array("I", [listing.add_shard(path)]) * len(part))
        listing.offset.extend(part.offset)
        listing.length.extend(part.length)
        listing.label.extend(_renumbered(part.label, [names.setdefault(name, len(names)) for name in part.classes]))
        listing.problems += part.problems
    classes = Path(listing.root, CLASSES)
    given = classes.read_text("utf-8-sig", "surrogateescape").rstrip().split("\n") if classes.exists() else []
    _number_classes(listing, list(names), given)
    return listing


def _list_each(paths: Sequence[str]) -> Iterator[ImageList]:
    if len(paths) < PROCESSES:
        yield from map(_list_shard, paths)
    else:  # processes, not threads: reading headers is as much work as waiting for them
        with start_process_pool(None, PROCESSES) as pool:
            yield from pool.map(_list_shard, paths)


def _list_shard(path: str) -> ImageList:
    """One shard; the labels are numbers of its ``classes``, these in order of appearance."""
    listing = ImageList(os.path.dirname(path))
    names: dict[str, int] = {}
    try:
        file: IO[bytes] = io.BytesIO(decompress(path)) if path.endswith("gz") else open(path, "rb")
    except ImageError as error:
        listing.problems.append(f"{path}: damaged ({error.reason}); none of its images are used")
        return listing
    with file:
        stem = os.path.basename(path).removesuffix(".tar")
        label = stem if re.fullmatch(r"n\d{8}", stem) else None  # a class of ImageNet-21k
        for offset, length, name in _tar_images(file, path, (0, file.seek(0, os.SEEK_END)), label, listing.problems):
            listing.add(0, offset, length, _numbered(name, names))
    listing.classes = list(names)
    return listing


def _tar_images(
    file: IO[bytes], path: str, span: tuple[int, int], label: str | None, problems: list[str], nested: bool = False
) -> Iterator[tuple[int, int, str | None]]:
    """Offset, length and label of the images in the tar that is bytes ``span`` of a file, and those of tars within it."""
    found, left_out, damage = 0, Counter[str](), list[str]()
    for _, members in itertools.groupby(_tar_members(file, span, damage), _key):
        sample = list(members)
        name = _class_of(file, sample, left_out) or label
        for member in sample:
            base = os.path.basename(member.name)
            if not member.isreg() or member.issparse():
                left_out["links and sparse files"] += is_image(base)
            elif _is_tar(member) and not nested:  # of one class, as in ILSVRC2012_img_train.tar
                inside = member.offset_data, min(member.offset_data + member.size, span[1])
                yield from _tar_images(file, f"{path}/{member.name}", inside, base.removesuffix(".tar"), problems, nested=True)
            elif is_image(base) and member.size >= 2**32:
                left_out["images of 4 GiB and more"] += 1
            elif is_image(base):
                found += 1
                yield member.offset_data, member.size, name
    problems += [f"{path}: {count} {what} are left out" for what, count in left_out.items() if count]
    problems += [f"{path}: damaged after {what}; its first {found} images are used" for what in damage]


def _tar_members(file: IO[bytes], span: tuple[int, int], damage: list[str]) -> Iterator[tarfile.TarInfo]:
    """Files of a tar as far as it goes; if not to its end, ``damage`` says where it stops. A tar within may be cut off."""
    sound, end = span
    try:
        file.seek(sound)
        tar = tarfile.TarFile(fileobj=file)
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # else all headers stay in memory
            is_file = member.isreg() and not member.issparse()
            cut = tar.offset >= end + tarfile.BLOCKSIZE or (is_file and member.offset_data + member.size > end)
            if tar.offset <= sound:
                raise tarfile.ReadError("negative size")
            if (is_file and (not cut or _is_tar(member))) or not (is_file or member.isdir()):
                yield member
            if cut:
                raise tarfile.ReadError(f"{member.name} is cut off")
            sound = tar.offset
        file.seek(sound)  # tarfile takes a header that it cannot read for the end
        if sound + tarfile.BLOCKSIZE > end or any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError("no header and no end mark")
        tail = file.read(min(end - sound - tarfile.BLOCKSIZE, LONGEST_TAIL))
        if any(tail) or len(tail) == LONGEST_TAIL:
            raise tarfile.ReadError("an end mark there, but it is not the end")
    except OSError:
        raise  # of the storage
    except Exception as error:  # damaged headers make tarfile raise errors of all kinds
        damage.append(f"byte {sound} ({str(error) or type(error).__name__})")


def _is_tar(member: tarfile.TarInfo) -> bool:
    return member.name.endswith(".tar") and not os.path.basename(member.name).startswith(".")


def _key(member: tarfile.TarInfo) -> str:
    folder, name = os.path.split(member.name)
    return os.path.join(folder, name.split(".", 1)[0])


def _class_of(file: IO[bytes], sample: Sequence[tarfile.TarInfo], left_out: Counter[str]) -> str | None:
    for member in sample:
        if member.name.endswith(".cls") and member.isreg():
            file.seek(member.offset_data)
            try:
                return file.read(member.size).decode().strip()
            except UnicodeDecodeError:
                left_out["labels that are not UTF-8"] += 1
    return None
