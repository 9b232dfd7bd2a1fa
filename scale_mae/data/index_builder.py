"""Building an index: list a source, then look at every image in worker processes that share the rows.

The rows lie in ``OUT.partial`` from the start and are filled in place, so that an interrupted build goes on where it was.
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
from scale_mae.data.pillow import Header, read_header
from scale_mae.data.sources import ImageList, list_images
from scale_mae.system.lock import exclusive_lock
from scale_mae.system.process_pool import map_unordered, shared_state, start_process_pool
from scale_mae.system.resources import available_cores

CHUNK = 200  # images of one task
HEAD = 1 << 16  # bytes in which a header is looked for before all are read
Progress = Callable[[int, int], None]


def build_index(
    source: str, out: str | Path, *, verify: bool = True, workers: int | None = None, progress: Progress | None = None
) -> Index:
    """List a source, look at every image, write the index. ``OUT.quarantined.txt`` names the images left out, and why.

    Args:
        source: class folders, tar shards, a list, annotations, or a named layout; see :func:`list_images`.
        out: the file to write; ``out.partial`` holds the work until it is done, and the same call continues it.
        verify: decode every image; otherwise only its header is read.
        workers: processes; by default as many as cores.
        progress: called with (images done, images in all).

    Raises:
        DataError: nothing there, nothing usable, or the index cannot be written.
    """
    out, source = Path(out), os.path.abspath(source) if os.path.exists(source) else source
    partial = out.with_name(out.name + ".partial")
    with exclusive_lock(partial.with_name(f"{partial.name}.lock"), f"{out} is being built"):
        if not partial.exists():
            _write_listing(source, partial, verify)
        metadata, rows, paths = map_index(partial, "r+")
        if (metadata["source"], metadata["verified"]) != (source, verify):
            raise DataError(f"{partial} is the unfinished index of {metadata['source']}; finish that, or delete the file")
        if (rows["status"] != ImageStatus.PENDING).any():
            listed = time.strftime("%Y-%m-%d %H:%M", time.localtime(metadata["listed"]))
            metadata["problems"].append(f"{source}: went on with what was listed at {listed}; images added since are not in it")
        rows["status"][rows["status"] == ImageStatus.BEGUN] = ImageStatus.PENDING  # an earlier build was stopped at these
        _examine_all(_Work(rows, paths, verify), workers or available_cores(), progress or (lambda done, total: None))
        usable = rows["status"] < ImageStatus.EMPTY
        metadata["usable"] = int(usable.sum())
        if not usable.any():
            text = format_location(paths, rows[0])
            raise DataError(f"{source}: none of {len(rows)} images can be used; {text}: {ImageStatus(rows[0]['status']).text}")
        write_index(out, rows[np.argsort(~usable, kind="stable")], paths, metadata)
        partial.unlink()
    index, named = Index.open(out), out.with_name(out.name + ".quarantined.txt")
    if len(index.quarantined):
        named.write_text("".join(f"{where}\t{cause}\n" for where, cause in index.quarantined_images()), "utf-8")
    else:
        named.unlink(missing_ok=True)
    return index


def open_index(source: str) -> Index:
    """A source's own index, or one made for this moment from the images' headers.

    Raises:
        DataError: see :func:`build_index`.
    """
    if own := existing_index(source):
        return Index.open(own)
    with tempfile.TemporaryDirectory() as folder:
        return build_index(source, Path(folder) / "data.index", verify=False)  # stays mapped after its file is gone


def list_source(source: str) -> Index:
    """A source's own index, or a list of its images, none of which was looked at: their sizes are not known, and any may be
    damaged.

    Raises:
        DataError: see :func:`scale_mae.data.sources.list_images`.
    """
    if own := existing_index(source):
        return Index.open(own)
    listing = list_images(source)
    paths = ShardPaths.of(listing.root, listing.shards)
    return Index(_rows(listing), np.zeros(0, ENTRY_DTYPE), paths, list(listing.classes), source, listing.problems, "")


def _rows(listing: ImageList) -> Entries:
    rows = np.zeros(len(listing), ENTRY_DTYPE)
    for name in ("shard", "offset", "length", "label"):
        rows[name] = getattr(listing, name)
    rows["status"] = ImageStatus.PENDING
    return rows


def _write_listing(source: str, partial: Path, verify: bool) -> None:
    listing = list_images(source)
    rows = _rows(listing)
    facts = {"source": source, "verified": verify, "listed": time.time(), "usable": 0}
    facts |= {"classes": list(listing.classes), "problems": listing.problems}
    write_index(partial, rows, ShardPaths.of(listing.root, listing.shards), facts)


class _Work(NamedTuple):
    """What the processes share: rows mapped writable, where their bytes are, whether to decode them."""

    rows: Entries
    paths: ShardPaths
    verify: bool


def _examine_all(work: _Work, workers: int, progress: Progress) -> None:
    """Look at every pending row. An image that ends the process which decodes it costs only itself."""
    status = work.rows["status"]
    while (status == ImageStatus.PENDING).any():
        try:
            _examine_in_processes(work, workers, progress)
        except BrokenProcessPool:
            begun = np.flatnonzero(status == ImageStatus.BEGUN).tolist()  # one a worker; which of them was it?
            if not begun:
                raise DataError("processes that look at images are killed as they start; is there enough memory?") from None
            for row in begun:
                status[row] = ImageStatus.PENDING
                try:
                    with start_process_pool(work, 1) as pool:
                        pool.submit(_examine_rows, (row, row + 1)).result()
                except BrokenProcessPool:
                    status[row] = ImageStatus.CRASHED


def _examine_in_processes(work: _Work, workers: int, progress: Progress) -> None:
    status = work.rows["status"]
    total = len(status)
    chunks = (
        (first, min(first + CHUNK, total))
        for first in range(0, total, CHUNK)
        if (status[first : first + CHUNK] == ImageStatus.PENDING).any()
    )

    def name_those_waited_for() -> None:
        for row in work.rows[status == ImageStatus.BEGUN]:
            print(f"{format_location(work.paths, row)}: no answer from storage yet", file=sys.stderr, flush=True)

    done = int((status > ImageStatus.BEGUN).sum())
    progress(done, total)
    with map_unordered(
        _examine_rows, chunks, processes=workers, max_pending=4 * workers, state=work, on_idle=name_those_waited_for
    ) as results:
        for number in results:
            done += number
            progress(done, total)


def _examine_rows(part: tuple[int, int]) -> int:
    """Fill in the pending rows of a range; runs in a worker. Returns how many there were."""
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
                length = storage.size(path)
            if length > storage.MAX_BYTES:
                raise ImageError(ImageStatus.TOO_LARGE, f"{length} bytes")
            row["length"] = length
            header = _header(path, offset, length) if not verify else read_header(storage.read(path, offset, length), True)
            row["width"], row["height"], row["orientation"] = header
            row["status"] = ImageStatus.DECODED if verify else ImageStatus.HEADER_READ
        except ImageError as error:
            row["status"] = error.cause
    return len(pending)


def _header(path: str, offset: int, length: int) -> Header:
    try:
        return read_header(storage.read(path, offset, min(length, HEAD)), False)
    except ImageError:
        return read_header(storage.read(path, offset, length), False)  # some formats keep what is asked for at the end
