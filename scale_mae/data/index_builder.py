"""Builds an index: lists a source, then checks every image in worker processes.

The rows are in ``OUT.partial`` from the start. The workers fill them in place, so that an interrupted build can continue.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scale_mae.data import storage
from scale_mae.data.errors import DataError, ImageError, ImageStatus
from scale_mae.data.image_list import ImageList
from scale_mae.data.index import (
    ENTRY_DTYPE,
    Entries,
    Index,
    ShardPaths,
    existing_index,
    format_location,
    map_index,
    write_index,
)
from scale_mae.data.pillow import Header, read_image_header
from scale_mae.data.sources import list_images
from scale_mae.system.lock import exclusive_lock
from scale_mae.system.process_pool import map_unordered, shared_state, start_process_pool
from scale_mae.system.resources import available_cores

CHUNK = 200  # images per task
HEADER_BYTES = 1 << 16  # a header is first looked for in this many bytes, then in the whole file
Progress = Callable[[int, int], None]


def build_index(
    source: str, out: str | Path, *, verify: bool = True, workers: int | None = None, progress: Progress | None = None
) -> Index:
    """List a source, check every image, and write the index.

    ``OUT.quarantined.txt`` names the unusable images and the causes. Calling this again continues an interrupted build.

    Args:
        source: Class folders, tar shards, a list, annotations or a layout; see :func:`~scale_mae.data.sources.list_images`.
        out: The file to write. ``out.partial`` contains the work in progress.
        verify: Decode every image. Otherwise only its header is read.
        workers: Number of processes; one per core by default.
        progress: Called with the number of checked images and the number of all images.

    Raises:
        DataError: No image is usable, or the source or the index file cannot be used.
        UserError: Another process builds the same index.
    """
    out, source = Path(out), os.path.abspath(source) if os.path.exists(source) else source
    partial = out.with_name(out.name + ".partial")
    with exclusive_lock(partial.with_name(f"{partial.name}.lock"), f"{out} is being built"):
        if not partial.exists():
            _write_image_list(source, partial, verify)
        metadata, rows, paths = map_index(partial, "r+")
        if (metadata["source"], metadata["verified"]) != (source, verify):
            how = "with" if metadata["verified"] else "without"
            raise DataError(
                f"{partial}: the unfinished index of {metadata['source']} {how} verification. Run the command that started it "
                "again, or delete the file."
            )
        if (rows["status"] != ImageStatus.PENDING).any():
            listed = time.strftime("%Y-%m-%d %H:%M", time.localtime(metadata["listed"]))
            metadata["problems"].append(
                f"{source}: continued an interrupted build; images added since {listed} are not in the index"
            )
        rows["status"][rows["status"] == ImageStatus.BEGUN] = ImageStatus.PENDING  # the interrupted build was checking these
        _check_all(_Work(rows, paths, verify), workers or available_cores(), progress or (lambda done, total: None))
        usable = rows["status"] < ImageStatus.EMPTY
        metadata["usable"] = int(usable.sum())
        if not usable.any():
            location, cause = format_location(paths, rows[0]), ImageStatus(rows[0]["status"]).text
            raise DataError(f"{source}: none of the {len(rows)} images is usable. The first one: {location}: {cause}.")
        write_index(out, rows[np.argsort(~usable, kind="stable")], paths, metadata)
        partial.unlink()
    index = Index.open(out)
    _write_quarantine(index, out.with_name(out.name + ".quarantined.txt"))
    return index


def open_index(source: str) -> Index:
    """Open the index of a source. If it has none, build a temporary one from the image headers.

    Raises:
        DataError: See :func:`build_index`.
    """
    if path := existing_index(source):
        return Index.open(path)
    with tempfile.TemporaryDirectory() as folder:
        return build_index(source, Path(folder) / "data.index", verify=False)  # stays mapped after the file is deleted


def list_source(source: str) -> Index:
    """Open the index of a source. If it has none, only list its images: their sizes are unknown, and any may be damaged.

    Raises:
        DataError: See :func:`~scale_mae.data.sources.list_images`.
    """
    if path := existing_index(source):
        return Index.open(path)
    images = list_images(source)
    return Index(
        entries=_rows(images),
        quarantined=np.zeros(0, ENTRY_DTYPE),
        shards=ShardPaths.from_strings(images.root, images.shards),
        classes=list(images.classes),
        source=source,
        problems=images.problems,
        digest="",
    )


def _rows(images: ImageList) -> Entries:
    rows = np.zeros(len(images), ENTRY_DTYPE)
    for name in ("shard", "offset", "length", "label"):
        rows[name] = getattr(images, name)
    rows["status"] = ImageStatus.PENDING
    return rows


def _write_image_list(source: str, partial: Path, verify: bool) -> None:
    images = list_images(source)
    metadata = {"source": source, "verified": verify, "listed": time.time(), "usable": 0}
    metadata |= {"classes": list(images.classes), "problems": images.problems}
    write_index(partial, _rows(images), ShardPaths.from_strings(images.root, images.shards), metadata)


def _write_quarantine(index: Index, path: Path) -> None:
    if len(index.quarantined):
        path.write_text("".join(f"{location}\t{cause}\n" for location, cause in index.quarantined_images()), "utf-8")
    else:
        path.unlink(missing_ok=True)


class _Work(NamedTuple):
    """The state that the worker processes share.

    Attributes:
        rows: Rows of the index, mapped writable.
        paths: Paths of the shards.
        verify: Decode the images instead of reading their headers.
    """

    rows: Entries
    paths: ShardPaths
    verify: bool


def _check_all(work: _Work, workers: int, progress: Progress) -> None:
    """Check every pending row. An image that crashes its worker does not stop the build."""
    status = work.rows["status"]
    while (status == ImageStatus.PENDING).any():
        try:
            _check_in_processes(work, workers, progress)
        except BrokenProcessPool:
            # Each worker was checking one image. Check these again, one by one, to find the one that crashes its worker.
            begun = np.flatnonzero(status == ImageStatus.BEGUN).tolist()
            if not begun:
                raise DataError("The worker processes are killed as they start. Check that there is enough memory.") from None
            for row in begun:
                status[row] = ImageStatus.PENDING
                try:
                    with start_process_pool(work, 1) as pool:
                        pool.submit(_check_rows, (row, row + 1)).result()
                except BrokenProcessPool:
                    status[row] = ImageStatus.CRASHED


def _check_in_processes(work: _Work, workers: int, progress: Progress) -> None:
    status = work.rows["status"]
    total = len(status)
    chunks = (
        (first, min(first + CHUNK, total))
        for first in range(0, total, CHUNK)
        if (status[first : first + CHUNK] == ImageStatus.PENDING).any()
    )

    def report_waiting() -> None:
        for row in work.rows[status == ImageStatus.BEGUN]:
            print(f"{format_location(work.paths, row)}: still waiting for the storage.", file=sys.stderr, flush=True)

    done = int((status > ImageStatus.BEGUN).sum())
    progress(done, total)
    with map_unordered(
        _check_rows, chunks, processes=workers, max_pending=4 * workers, state=work, on_idle=report_waiting
    ) as results:
        for number in results:
            done += number
            progress(done, total)


def _check_rows(part: tuple[int, int]) -> int:
    """Check the pending rows of a range and fill them in. Return their number. This runs in a worker."""
    rows, paths, verify = shared_state()
    first, last = part
    pending = first + np.flatnonzero(rows["status"][first:last] == ImageStatus.PENDING)
    for number in pending.tolist():
        row = rows[number]
        row["status"] = ImageStatus.BEGUN
        try:
            path, offset = paths[row["shard"]], int(row["offset"])
            length = int(row["length"])
            if not (length or offset):
                length = storage.file_size(path)
            if length > storage.MAX_IMAGE_BYTES:
                raise ImageError(ImageStatus.TOO_LARGE, f"{length} bytes")
            row["length"] = length
            header = (
                read_image_header(storage.read(path, offset, length), verify=True) if verify else _header(path, offset, length)
            )
            row["width"], row["height"], row["orientation"] = header
            row["status"] = ImageStatus.DECODED if verify else ImageStatus.HEADER_READ
        except ImageError as error:
            row["status"] = error.cause
    return len(pending)


def _header(path: str, offset: int, length: int) -> Header:
    try:
        return read_image_header(storage.read(path, offset, min(length, HEADER_BYTES)))
    except ImageError:
        return read_image_header(storage.read(path, offset, length))  # some formats have the header at the end
