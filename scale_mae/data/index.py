"""What exists: one file with a row for every image of a source, built once, memory-mapped by every process.

A row (:data:`ENTRY_DTYPE`) says where an image's bytes are (shard, offset, length), its upright size (width, height,
after its EXIF orientation), its label, and its :class:`~scale_mae.data.storage.ImageStatus`. Usable images come first, in the
order of the source; those that cannot be decoded follow and are never trained on. The file is in safetensors format: rows,
paths, and the rest in the metadata. Paths are kept relative to the index where the images lie below it, so that both can
be moved together.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from scale_mae.data import storage
from scale_mae.data.errors import DataError, ImageStatus, escape_unprintable

ENTRY_DTYPE = np.dtype(
    [
        ("offset", "<u8"),
        ("shard", "<u4"),
        ("length", "<u4"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("label", "<i4"),
        ("orientation", "u1"),
        ("status", "u1"),
        ("", "V2"),
    ]
)
FORMAT = "scale_mae.index.1"
TENSORS = ("entries", "paths", "path_ends")
INDEX_NAME = "data.index"  # in a folder of shards, the index of these shards
INDEX_SUFFIX = ".index"
Entries = NDArray[np.void]


class ShardPaths(Sequence[str]):
    """Absolute paths of shards, looked up in the mapped file, so that any number of them opens at once.

    Attributes:
        root: absolute folder they are relative to.
        text: all relative paths, one after the other.
        ends: where each ends in ``text``.
    """

    def __init__(self, root: str, text: NDArray[np.uint8], ends: NDArray[np.uint64]) -> None:
        self.root, self.text, self.ends = root, text, ends

    @classmethod
    def of(cls, root: str, paths: Sequence[str]) -> ShardPaths:
        """From relative paths."""
        encoded = [os.fsencode(path) for path in paths]
        ends = np.cumsum([len(path) for path in encoded], dtype=np.uint64)
        return cls(root, np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = range(len(self))[number]  # counts from the end, and out of range, as sequences do
        begin = int(self.ends[number - 1]) if number else 0
        return os.path.join(self.root, os.fsdecode(self.text[begin : int(self.ends[number])].tobytes()))


@dataclass(frozen=True)
class Index:
    """The images of a source.

    Attributes:
        entries: the usable images, structured array of dtype :data:`ENTRY_DTYPE`, ``[N]``.
        quarantined: the others, likewise, ``[Q]``.
        shards: absolute path of each shard; an image file that is in no shard is its own.
        classes: names of the labels, possibly empty.
        source: what was indexed.
        problems: what could not be listed, one line each.
        digest: sixteen hexadecimal digits that change with any row or path.
    """

    entries: Entries
    quarantined: Entries
    shards: Sequence[str]
    classes: Sequence[str]
    source: str
    problems: Sequence[str]
    digest: str

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, sample: int) -> bytes:
        """The encoded bytes of one image.

        Raises:
            ImageError: storage does not give them.
        """
        entry = self.entries[sample]
        path, offset, length = self.shards[entry["shard"]], int(entry["offset"]), int(entry["length"])
        return storage.read(path, offset, length or (0 if offset else storage.size(path)))

    def location(self, sample: int) -> str:
        """Path, and byte offset inside a shard, of one image, for messages."""
        return format_location(self.shards, self.entries[sample])

    def quarantine_counts(self) -> dict[str, int]:
        """How many images are quarantined for which cause."""
        counts = collections.Counter(self.quarantined["status"].tolist())
        return {ImageStatus(status).text: number for status, number in sorted(counts.items())}

    def quarantined_images(self) -> Iterator[tuple[str, str]]:
        """Place and cause of each quarantined image."""
        return ((format_location(self.shards, row), ImageStatus(row["status"]).text) for row in self.quarantined)

    @classmethod
    def open(cls, path: str | Path) -> Index:
        """Memory-map an index; costs the same for any number of images.

        Raises:
            DataError: missing, damaged, or of another kind.
        """
        metadata, rows, paths = map_index(Path(path), "r")
        usable = metadata["usable"]
        return cls(
            rows[:usable],
            rows[usable:],
            paths,
            metadata["classes"],
            metadata["source"],
            metadata["problems"],
            metadata["digest"],
        )


def format_location(shards: Sequence[str], entry: Any) -> str:
    """Path, and byte offset inside a shard, of one row."""
    path = escape_unprintable(shards[entry["shard"]])
    return f"{path}@{entry['offset']}" if entry["offset"] else path


def map_index(path: Path, mode: str = "r") -> tuple[dict[str, Any], Entries, ShardPaths]:
    """Metadata, rows and paths of an index file, mapped with numpy's ``mode``.

    Raises:
        DataError: missing, damaged, or of another kind.
    """

    def tensor(name: str, dtype: Any) -> Any:
        begin, end = header[name]["data_offsets"]
        count = (end - begin) // np.dtype(dtype).itemsize
        return np.memmap(path, dtype, mode, 8 + size + begin, count) if count else np.zeros(0, dtype)  # type: ignore[call-overload]

    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size < os.path.getsize(path) else {}
        metadata = {key: json.loads(value) for key, value in header.get("__metadata__", {}).items()}
        if metadata.get("format") != FORMAT:
            raise ValueError("it is no index, or one of another version")
        if os.path.getsize(path) != 8 + size + max(header[name]["data_offsets"][1] for name in TENSORS):
            raise ValueError("cut short")  # which a map opened for writing would fill up with zeros
        root = os.path.abspath(os.path.join(path.parent, metadata["root"]))
        return (
            metadata,
            tensor("entries", ENTRY_DTYPE),
            ShardPaths(root, tensor("paths", np.uint8), tensor("path_ends", np.uint64)),
        )
    except FileNotFoundError:
        raise DataError(f"{path}: no such index; make it with scale-mae index SOURCE --out {path}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged index ({error}); delete it and build it anew") from None


def write_index(path: Path, rows: Entries, paths: ShardPaths, metadata: dict[str, Any]) -> None:
    """Write an index file, whole or not at all: aside, flushed, renamed.

    Raises:
        DataError: it cannot be written.
    """
    plain = rows.view(np.uint8).reshape(-1, ENTRY_DTYPE.itemsize)
    digest = hashlib.sha256()
    for part in (plain, paths.text, paths.ends):
        digest.update(np.ascontiguousarray(part).data)
    folder = os.path.abspath(path.parent)
    below = os.path.commonpath([folder, paths.root]) == folder
    root = os.path.relpath(paths.root, folder) if below else paths.root
    metadata = metadata | {"format": FORMAT, "root": root, "digest": digest.hexdigest()[:16]}
    staging = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, NDArray[Any]] = {"entries": plain, "paths": paths.text, "path_ends": paths.ends}
        save_file(tensors, staging, {key: json.dumps(value) for key, value in metadata.items()})
        with open(staging, "rb+") as file:
            os.fsync(file.fileno())
        staging.rename(path)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise DataError(f"{path}: the index cannot be written ({error})") from None


def existing_index(source: str) -> Path | None:
    """The index that a source is or brings: an index file, or one in a folder of shards that were packed with it."""
    if source.endswith(INDEX_SUFFIX) and not os.path.isdir(source):
        return Path(source)
    inside = Path(source) / INDEX_NAME
    return inside if inside.is_file() else None
