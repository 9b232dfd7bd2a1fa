"""Lists the images of tar shards in the WebDataset convention, and of tars of class tars as ImageNet distributes them."""

from __future__ import annotations

import io
import itertools
import os
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from scale_mae.data.errors import ImageError, ImageStatus
from scale_mae.data.file_lists import is_image
from scale_mae.data.image_list import ImageList, assign_class_numbers, provisional_label, renumber
from scale_mae.data.storage import decompress
from scale_mae.system.process_pool import start_process_pool

CLASSES_FILE = "classes.txt"  # in the folder of the shards: one class name per line, in the order of the class numbers
MAX_PADDING = 1 << 20  # bytes; a tar may end in this many zeros at most
PROCESSES = 16  # list the shards, if there are at least as many


def list_shards(paths: Sequence[str]) -> ImageList:
    """List the images of shards.

    Labels are the contents of the ``.cls`` member that has the same key as the image. Numbers stand for themselves; names
    are numbered in the order of ``classes.txt`` if it exists, or else alphabetically.

    Args:
        paths: Absolute paths.

    Raises:
        OSError: A shard cannot be read.
        BrokenProcessPool: A worker process was killed.
    """
    images = ImageList(os.path.commonpath([os.path.dirname(path) for path in paths]))
    names: dict[str, int] = {}
    for path, part in zip(paths, _list_each(paths), strict=True):
        images.shard.extend(array("I", [images.add_shard(path)]) * len(part))
        images.offset.extend(part.offset)
        images.length.extend(part.length)
        images.label.extend(renumber(part.label, [names.setdefault(name, len(names)) for name in part.classes]))
        images.problems += part.problems
    file = Path(images.root, CLASSES_FILE)
    classes = file.read_text("utf-8-sig", "surrogateescape").rstrip().split("\n") if file.exists() else []
    assign_class_numbers(images, list(names), classes)
    return images


def _list_each(paths: Sequence[str]) -> Iterator[ImageList]:
    if len(paths) < PROCESSES:
        yield from map(_list_shard, paths)
    else:  # processes, not threads: parsing the headers takes as long as reading them
        with start_process_pool(None, PROCESSES) as pool:
            yield from pool.map(_list_shard, paths)


def _list_shard(path: str) -> ImageList:
    """List one shard. The labels are provisional: they number ``classes``, in order of appearance."""
    images = ImageList(os.path.dirname(path))
    names: dict[str, int] = {}
    try:
        file: IO[bytes] = io.BytesIO(decompress(path)) if path.endswith("gz") else open(path, "rb")
    except ImageError as error:
        images.problems.append(f"{path}: {ImageStatus.DAMAGED.text} ({error.reason}). None of its images is used.")
        return images
    with file:
        stem = os.path.basename(path).removesuffix(".tar")
        label = stem if re.fullmatch(r"n\d{8}", stem) else None  # the tar of a class of ImageNet-21k
        for offset, length, name in _tar_images(file, path, (0, file.seek(0, os.SEEK_END)), label, images.problems):
            images.add_image(0, offset, length, provisional_label(name, names))
    images.classes = list(names)
    return images


def _tar_images(
    file: IO[bytes], path: str, span: tuple[int, int], label: str | None, problems: list[str], nested: bool = False
) -> Iterator[tuple[int, int, str | None]]:
    """Yield offset, length and label of the images in a tar, and of the images in the tars inside it.

    Args:
        file: The open file.
        path: Its path, for messages.
        span: First byte of the tar in the file, and the byte after its last one.
        label: The label of images without a ``.cls`` member.
        problems: Messages are added here.
        nested: The tar is inside another one. Tars inside it are not listed.
    """
    found, skipped, damage = 0, Counter[str](), list[str]()
    for _, members in itertools.groupby(_tar_members(file, span, damage), _key):
        sample = list(members)
        name = _read_label(file, sample, skipped) or label
        for member in sample:
            base = os.path.basename(member.name)
            if not member.isreg() or member.issparse():
                skipped["links and sparse files"] += is_image(base)
            elif _is_tar(member) and not nested:  # the images of one class, as in ILSVRC2012_img_train.tar
                inside = member.offset_data, min(member.offset_data + member.size, span[1])
                yield from _tar_images(file, f"{path}/{member.name}", inside, base.removesuffix(".tar"), problems, nested=True)
            elif is_image(base) and member.size >= 2**32:
                skipped["images of 4 GiB or more"] += 1
            elif is_image(base):
                found += 1
                yield member.offset_data, member.size, name
    problems += [f"{path}: skipped {what}: {count}" for what, count in skipped.items() if count]
    problems += [f"{path}: damaged after {position}. Only the {found} images before it are used." for position in damage]


def _tar_members(file: IO[bytes], span: tuple[int, int], damage: list[str]) -> Iterator[tarfile.TarInfo]:
    """Yield the complete files of a tar. A nested tar may be incomplete.

    If the tar is damaged, this stops at the damage and adds its position and kind to ``damage``.
    """
    sound, end = span
    try:
        file.seek(sound)
        tar = tarfile.TarFile(fileobj=file)
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # otherwise all headers stay in memory
            is_file = member.isreg() and not member.issparse()
            cut = tar.offset >= end + tarfile.BLOCKSIZE or (is_file and member.offset_data + member.size > end)
            if tar.offset <= sound:
                raise tarfile.ReadError("negative size")
            if (is_file and (not cut or _is_tar(member))) or not (is_file or member.isdir()):
                yield member
            if cut:
                raise tarfile.ReadError(f"{member.name} is truncated")
            sound = tar.offset
        file.seek(sound)  # tarfile takes an unreadable header for the end of the archive
        if sound + tarfile.BLOCKSIZE > end or any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError("neither a header nor an end mark")
        tail = file.read(min(end - sound - tarfile.BLOCKSIZE, MAX_PADDING))
        if any(tail) or len(tail) == MAX_PADDING:
            raise tarfile.ReadError("an end mark, but more data follows")
    except OSError:
        raise  # from the storage
    except Exception as error:  # damaged headers make tarfile raise errors of many kinds
        damage.append(f"byte {sound} ({str(error) or type(error).__name__})")


def _is_tar(member: tarfile.TarInfo) -> bool:
    return member.name.endswith(".tar") and not os.path.basename(member.name).startswith(".")


def _key(member: tarfile.TarInfo) -> str:
    """Return the WebDataset key: the path up to the first dot of the file name."""
    folder, name = os.path.split(member.name)
    return os.path.join(folder, name.split(".", 1)[0])


def _read_label(file: IO[bytes], sample: Sequence[tarfile.TarInfo], skipped: Counter[str]) -> str | None:
    for member in sample:
        if member.name.endswith(".cls") and member.isreg():
            file.seek(member.offset_data)
            try:
                return file.read(member.size).decode().strip()
            except UnicodeDecodeError:
                skipped["labels that are not UTF-8"] += 1
    return None
