"""What exists: one table of all images of a source, built once, memory-mapped by every process.

An entry says where an image's bytes are (shard, offset, length), how large it is once upright (width, height, after its
EXIF orientation) and its label. Sources: class folders ``root/class/image`` and tar shards in the WebDataset convention
(``key.jpg`` beside ``key.cls``). Shards may be gzipped; these are held unpacked in memory, so keep them small.
"""

from __future__ import annotations

import functools
import gzip
import io
import itertools
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scale_mae.config import PACKAGE, UserError
from scale_mae.data.pillow import upright_size

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
DEMO = PACKAGE / "demo_data"
ENTRY = np.dtype([("shard", "u4"), ("offset", "u8"), ("length", "u4"), ("width", "u4"), ("height", "u4"), ("label", "i4")])
NO_LABEL = -1


class DataError(UserError):
    """A source that cannot be used, or an image of it."""


@dataclass(frozen=True)
class Index:
    """All images of a source.

    Attributes:
        entries: structured array of dtype :data:`ENTRY`, one an image, ordered by shard and offset.
        shards: path of each shard; for class folders every image file is its own shard.
        classes: names of the labels, possibly empty.
    """

    entries: NDArray[np.void]
    shards: Sequence[str]
    classes: Sequence[str]

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, sample: int) -> bytes:
        """The encoded bytes of one image.

        Raises:
            DataError: the shard is gone or shorter than it was.
        """
        entry = self.entries[sample]
        path, offset, length = self.shards[entry["shard"]], int(entry["offset"]), int(entry["length"])
        try:
            if path.endswith("gz"):
                data = _unpacked(path)[offset : offset + length]
            else:
                with open(path, "rb") as file:
                    file.seek(offset)
                    data = file.read(length)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: cannot be read ({error}); the data changed since it was indexed") from None
        if len(data) != length:
            raise DataError(f"{path}: ends before image {sample}; the data changed since it was indexed")
        return data

    def where(self, sample: int) -> str:
        """Path, and byte offset inside a shard, of one image, for messages."""
        entry = self.entries[sample]
        path = self.shards[entry["shard"]]
        return f"{path}@{entry['offset']}" if entry["offset"] else path

    def save(self, folder: Path) -> None:
        """Write the index to ``folder``; whole or not at all.

        Raises:
            DataError: it cannot be written.
        """
        staging = folder.with_name(folder.name + ".tmp")
        try:
            staging.mkdir(parents=True, exist_ok=True)
            np.save(staging / "entries.npy", self.entries)
            (staging / "names.json").write_text(json.dumps({"shards": list(self.shards), "classes": list(self.classes)}))
            staging.rename(folder)
        except OSError as error:
            raise DataError(f"{folder}: the index cannot be written ({error})") from None

    @classmethod
    def open(cls, folder: Path) -> Index:
        """Memory-map an index that :meth:`save` wrote.

        Raises:
            DataError: missing or damaged.
        """
        try:
            entries = np.load(folder / "entries.npy", mmap_mode="r")
            names = json.loads((folder / "names.json").read_text())
            return cls(entries, names["shards"], names["classes"])
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise DataError(f"{folder}: damaged ({error}); delete this folder and it is built anew") from None


class _Found(NamedTuple):
    """An image of a scanned shard, its header not yet looked at."""

    shard: int
    offset: int
    length: int
    label: str | None


def scan(source: str, threads: int = 8) -> Index:
    """Build the index of a source: list its files, read every image's header.

    Raises:
        DataError: nothing there, a damaged shard, a mixture of label kinds, or images whose header cannot be read.
    """
    try:
        shards, found = _scan_shards(source) if _is_shards(source) else _scan_folders(Path(source))
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error})") from None
    if not found:
        raise DataError(f"{source}: no images found; expected class folders root/class/*.jpg or tar shards of key.jpg, key.cls")
    classes, labels = _labels(source, [f.label for f in found])
    entries = np.zeros(len(found), ENTRY)
    for name in ("shard", "offset", "length"):
        entries[name] = [getattr(f, name) for f in found]
    entries["label"] = labels
    index = Index(entries, shards, classes)
    with ThreadPoolExecutor(threads) as pool:
        sizes = list(pool.map(functools.partial(_header, index), range(len(index))))
    bad = [i for i, size in enumerate(sizes) if size is None]
    if bad:
        raise DataError(f"{index.where(bad[0])}: not a readable image ({len(bad)} of {len(index)} are not); remove it")
    entries["width"], entries["height"] = np.array(sizes).T
    return index


def _header(index: Index, sample: int) -> tuple[int, int] | None:
    try:
        return upright_size(index.read(sample))
    except OSError:
        return None


def _is_shards(source: str) -> bool:
    if source.startswith("demo:") or source.endswith((".tar", ".tar.gz", ".tgz")):
        return True
    return any(_is_tar(p) for p in Path(source).glob("*"))


def _is_tar(path: Path) -> bool:
    return path.name.endswith((".tar", ".tar.gz", ".tgz"))


def shard_paths(source: str) -> list[str]:
    """Shards of a source: a folder of tars, one tar, a brace list ``name-{000..146}.tar``, or ``demo:train``/``demo:val``.

    Raises:
        DataError: a shard is missing, or there is none.
    """
    if source.startswith("demo:"):
        paths = sorted(DEMO.glob(f"{source.removeprefix('demo:')}-*.tar.gz"))
    elif braces := re.search(r"\{(\d+)\.\.(\d+)\}", source):
        first, last = braces.groups()
        numbers = range(int(first), int(last) + 1)
        paths = [Path(source.replace(braces.group(), f"{n:0{len(first)}d}")) for n in numbers]
    else:
        paths = sorted(filter(_is_tar, Path(source).iterdir())) if Path(source).is_dir() else [Path(source)]
    missing = [p for p in paths if not p.is_file()]
    if missing or not paths:
        raise DataError(f"{missing[0] if missing else source}: no such shard; check data.source={source}")
    return [str(p.absolute()) for p in paths]


def _scan_shards(source: str) -> tuple[list[str], list[_Found]]:
    shards = shard_paths(source)
    found: list[_Found] = []
    for number, path in enumerate(shards):
        try:
            with _open_tar(path) as tar:
                for _, members in itertools.groupby((m for m in tar if m.isfile()), key=_key):
                    found.extend(_sample(tar, list(members), number))
        except (tarfile.TarError, EOFError, OSError, zlib.error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not a whole tar file ({error}); copy it again or remove it") from None
    return shards, found


def _key(member: tarfile.TarInfo) -> str:
    folder, name = os.path.split(member.name)
    return os.path.join(folder, name.split(".", 1)[0])


def _sample(tar: tarfile.TarFile, members: Sequence[tarfile.TarInfo], shard: int) -> Iterator[_Found]:
    label = None
    for member in members:
        if member.name.endswith(".cls"):
            stream = tar.extractfile(member)
            assert stream is not None  # the caller passes regular files only
            label = stream.read().decode().strip()
    for member in members:
        if member.name.lower().endswith(IMAGE_SUFFIXES):
            yield _Found(shard, member.offset_data, member.size, label)


def _open_tar(path: str) -> tarfile.TarFile:
    if path.endswith("gz"):
        return tarfile.open(fileobj=io.BytesIO(_unpacked(path)))
    return tarfile.open(path, "r:")


@functools.lru_cache(maxsize=64)
def _unpacked(path: str) -> bytes:
    with gzip.open(path) as file:
        return file.read()


def _scan_folders(root: Path) -> tuple[list[str], list[_Found]]:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; set data.source to class folders, tar shards or demo:train")
    shards: list[str] = []
    found: list[_Found] = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        for path in _images_below(folder):
            found.append(_Found(len(shards), 0, os.path.getsize(path), folder.name))
            shards.append(os.path.abspath(path))
    return shards, found


def _images_below(folder: Path) -> Iterable[str]:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        yield from (os.path.join(parent, name) for name in sorted(files) if name.lower().endswith(IMAGE_SUFFIXES))


def _labels(source: str, labels: Sequence[str | None]) -> tuple[list[str], list[int]]:
    """Class names and the number of each image's class: numbers as they stand, names in alphabetical order."""
    given = {label for label in labels if label is not None}
    if all(re.fullmatch(r"\d{1,9}", label) for label in given) and _is_shards(source):
        return [], [NO_LABEL if label is None else int(label) for label in labels]
    classes = sorted(given)
    number = {name: i for i, name in enumerate(classes)}
    return classes, [NO_LABEL if label is None else number[label] for label in labels]
