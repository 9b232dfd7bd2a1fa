"""The index of a data set: one file with a row for every image, built once and memory-mapped by every process.

A row (:data:`ENTRY_DTYPE`) contains the location of the image (shard, offset, length), its upright size (width and height
after its EXIF orientation is applied), its label and its :class:`~scale_mae.data.errors.ImageStatus`. The usable images come
first, in the order of the source. The quarantined images follow; they are never trained on.

The file is in safetensors format. Its tensors are the rows and the shard paths; everything else is metadata. Paths are
relative to the index if the images lie below its folder, so that both can be moved together.
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
INDEX_NAME = "data.index"  # the file name of an index inside a folder of packed shards, or inside a run directory
INDEX_SUFFIX = ".index"
Entries = NDArray[np.void]


class ShardPaths(Sequence[str]):
    """Absolute paths of shards, read from the mapped file on access, so that opening an index takes the same time for any size.

    Attributes:
        root: Absolute folder to which the paths are relative.
        text: All relative paths, concatenated.
        ends: End of each path in ``text``.
    """

    def __init__(self, root: str, text: NDArray[np.uint8], ends: NDArray[np.uint64]) -> None:
        self.root, self.text, self.ends = root, text, ends

    @classmethod
    def from_strings(cls, root: str, paths: Sequence[str]) -> ShardPaths:
        """Encode paths relative to ``root``."""
        encoded = [os.fsencode(path) for path in paths]
        ends = np.cumsum([len(path) for path in encoded], dtype=np.uint64)
        return cls(root, np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = range(len(self))[number]  # supports negative numbers and raises IndexError
        begin = int(self.ends[number - 1]) if number else 0
        return os.path.join(self.root, os.fsdecode(self.text[begin : int(self.ends[number])].tobytes()))


@dataclass(frozen=True)
class Index:
    """The images of a source.

    Attributes:
        entries: The usable images, a structured array of dtype :data:`ENTRY_DTYPE`, ``[N]``.
        quarantined: The unusable images, in the same format, ``[Q]``.
        shards: Absolute path of each shard. An image file outside a shard is its own shard.
        classes: Class names in the order of the labels; possibly empty.
        source: The indexed source.
        problems: One line for each problem that was found while the source was listed.
        digest: Sixteen hexadecimal digits that change with any row or path.
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
        """Read the encoded bytes of one image.

        Raises:
            ImageError: UNREADABLE: the storage failed.
        """
        entry = self.entries[sample]
        path, offset, length = self.shards[entry["shard"]], int(entry["offset"]), int(entry["length"])
        return storage.read(path, offset, length or (0 if offset else storage.file_size(path)))

    def location(self, sample: int) -> str:
        """Return the path of one image for messages, with ``@offset`` if it is inside a shard."""
        return format_location(self.shards, self.entries[sample])

    def quarantine_counts(self) -> dict[str, int]:
        """Return the number of quarantined images for each cause."""
        counts = collections.Counter(self.quarantined["status"].tolist())
        return {ImageStatus(status).text: number for status, number in sorted(counts.items())}

    def quarantined_images(self) -> Iterator[tuple[str, str]]:
        """Yield the location and the cause of each quarantined image."""
        return ((format_location(self.shards, row), ImageStatus(row["status"]).text) for row in self.quarantined)

    @classmethod
    def open(cls, path: str | Path) -> Index:
        """Memory-map an index. This takes the same time for any number of images.

        Raises:
            DataError: The file is missing, damaged or not an index.
        """
        metadata, rows, paths = map_index(Path(path), "r")
        usable = metadata["usable"]
        return cls(
            entries=rows[:usable],
            quarantined=rows[usable:],
            shards=paths,
            classes=metadata["classes"],
            source=metadata["source"],
            problems=metadata["problems"],
            digest=metadata["digest"],
        )


def format_location(shards: Sequence[str], entry: Any) -> str:
    """Format the location of one row as ``path``, or as ``path@offset`` inside a shard."""
    path = escape_unprintable(shards[entry["shard"]])
    return f"{path}@{entry['offset']}" if entry["offset"] else path


def map_index(path: Path, mode: str = "r") -> tuple[dict[str, Any], Entries, ShardPaths]:
    """Memory-map an index file.

    Args:
        path: The index file.
        mode: numpy's mode, ``r`` or ``r+``.

    Returns:
        Metadata, rows, and paths of the shards.

    Raises:
        DataError: The file is missing, damaged or not an index.
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
            raise ValueError(f"not in the format {FORMAT}")
        if os.path.getsize(path) != 8 + size + max(header[name]["data_offsets"][1] for name in TENSORS):
            raise ValueError("truncated")  # a map opened for writing would fill the missing part with zeros
        root = os.path.abspath(os.path.join(path.parent, metadata["root"]))
        rows, text, ends = tensor("entries", ENTRY_DTYPE), tensor("paths", np.uint8), tensor("path_ends", np.uint64)
        return metadata, rows, ShardPaths(root, text, ends)
    except FileNotFoundError:
        raise DataError(f"{path}: no such index. Build it with `scale-mae index SOURCE --out {path}`.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except (EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: damaged index ({error}). Delete the file and build it again with `scale-mae index`."
        ) from None


def write_index(path: Path, rows: Entries, paths: ShardPaths, metadata: dict[str, Any]) -> None:
    """Write an index file atomically: under a temporary name, flushed to disk, then renamed.

    Raises:
        DataError: The file cannot be written.
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
        raise DataError(f"{path}: the index cannot be written ({error}).") from None


def existing_index(source: str) -> Path | None:
    """Return the index that a source already has: the source is an index file, or a packed folder that contains one."""
    if source.endswith(INDEX_SUFFIX) and not os.path.isdir(source):
        return Path(source)
    inside = Path(source) / INDEX_NAME
    return inside if inside.is_file() else None
