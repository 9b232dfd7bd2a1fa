"""Packing: images again as small, clean, shuffled JPEGs in tar shards, for training whose decoders cannot keep up.

Which image goes where depends on the index and the settings only, so each shard is made on its own, in parallel, and an
interrupted packing goes on with the shards that are missing.
"""

from __future__ import annotations

import io
import json
import math
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from scale_mae.data.errors import DataError, ImageError
from scale_mae.data.image_list import NO_LABEL
from scale_mae.data.index import INDEX_NAME, Index, existing_index
from scale_mae.data.index_builder import Progress, build_index, open_index
from scale_mae.data.pillow import reencode_as_jpeg
from scale_mae.data.sample_plan import SamplePlan
from scale_mae.data.tar_shards import CLASSES_FILE
from scale_mae.system.lock import exclusive_lock
from scale_mae.system.process_pool import map_unordered, shared_state
from scale_mae.system.resources import available_cores

TRIED = 100  # images encoded for trial, to learn how large they become
SETTINGS = "packing.json"
LEFT_OUT = ".left_out.txt"


@dataclass(frozen=True)
class PackResult:
    """The index of the shards, and a line for each image that could not be packed."""

    index: Index
    left_out: Sequence[str]


@dataclass(frozen=True)
class _Packing:
    index: Index
    folder: Path
    order: SamplePlan
    short_side: int
    quality: int
    per_shard: int


def pack(
    source: str,
    out: str | Path,
    *,
    short_side: int = 256,
    quality: int = 90,
    shard_mb: float = 256,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PackResult:
    """Re-encode all usable images of a source into shuffled tar shards in the WebDataset convention, with their index.

    Args:
        source: an index, or what one is made of.
        out: folder for ``shard-000000.tar`` and so on, ``classes.txt`` and ``data.index``.
        short_side: larger images are scaled down to it, in pixels.
        quality: of the JPEGs, 1 to 95.
        shard_mb: size of a shard in megabytes (10^6 bytes), about.
        seed: of the order.
        workers: processes; by default as many as cores.
        progress: called with (images done, images in all).

    Raises:
        DataError: an unusable source or setting, a folder of another packing, or a shard that cannot be written.
    """
    if not (short_side > 0 and 1 <= quality <= 95 and 0 < shard_mb < math.inf):
        raise DataError(f"--short-side {short_side} --quality {quality} --shard-mb {shard_mb:g}: positive, quality at most 95")
    folder, index, workers = Path(out), open_index(source), workers or available_cores()
    settings = {"data": index.digest, "short_side": short_side, "quality": quality, "shard_mb": shard_mb, "seed": seed}
    packing = _Packing(index, folder, SamplePlan(seed, len(index), 1), short_side, quality, 1)
    try:
        with exclusive_lock(folder / f"{INDEX_NAME}.lock", f"{folder} is being packed"):
            packing = replace(packing, per_shard=_begin(packing, settings))
            _write_missing(packing, workers, progress or (lambda done, total: None))
            left_out = [line for path in sorted(folder.glob(f"*{LEFT_OUT}")) for line in path.read_text("utf-8").splitlines()]
            packed = build_index(str(folder), folder / INDEX_NAME, workers=workers)
    except BrokenProcessPool:
        raise DataError(
            f"{source}: a packing process was killed, by an image or for want of memory; scale-mae index {source} finds such "
            "images; the same command goes on where it stopped"
        ) from None
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error}); the same command goes on where it stopped") from None
    if len(packed) + len(left_out) != len(index):
        raise DataError(f"{folder}: holds {len(packed)} of {len(index)} images and left out {len(left_out)}; take a new folder")
    if not existing_index(source):  # an index of the user's own has told what it leaves out
        left_out += [f"{where}: {cause}" for where, cause in index.quarantined_images()]
    return PackResult(packed, left_out)


def _begin(packing: _Packing, settings: dict[str, Any]) -> int:
    """Check the folder, or prepare it; images of a shard, which must not change when a packing goes on."""
    folder, described = packing.folder, packing.folder / SETTINGS
    if described.exists():
        try:
            there = json.loads(described.read_text("utf-8"))
            per_shard = int(there.pop("images_per_shard"))
        except (ValueError, KeyError):
            raise DataError(f"{described}: damaged; name another folder") from None
        if there != settings:
            raise DataError(f"{folder} holds another packing ({there}); name another folder")
        return per_shard
    if any(path.name not in (CLASSES_FILE, f"{INDEX_NAME}.lock") for path in folder.iterdir()):
        raise DataError(f"{folder} is not empty; name another folder")
    classes = packing.index.classes
    if any("\n" in name for name in classes):
        raise DataError("a class has a line break in its name; rename it")
    if classes:
        (folder / CLASSES_FILE).write_text("".join(f"{name}\n" for name in classes), "utf-8", errors="surrogateescape")
    per_shard = _images_per_shard(packing, settings["shard_mb"] * 1e6)
    staging = described.with_suffix(".tmp")
    staging.write_text(json.dumps(settings | {"images_per_shard": per_shard}), "utf-8")
    staging.rename(described)
    return per_shard


def _write_missing(packing: _Packing, workers: int, progress: Progress) -> None:
    total = len(packing.index)
    missing = [first for first in range(0, total, packing.per_shard) if not _shard(packing, first).exists()]
    done = total - sum(min(packing.per_shard, total - first) for first in missing)
    with map_unordered(_write_shard, missing, processes=workers, max_pending=workers, state=packing) as results:
        for images in results:
            done += images
            progress(done, total)


def _images_per_shard(packing: _Packing, size: float) -> int:
    """Images of a shard of ``size`` bytes, from those that come first."""
    tried = []
    for sample in _samples(packing, 0, min(TRIED, len(packing.index))):
        try:
            data = reencode_as_jpeg(packing.index.read(sample), packing.short_side, packing.quality)
        except ImageError:
            continue
        tried.append(512 * (3 + math.ceil(len(data) / 512)))  # a header each for image and label, contents in whole blocks
    return max(1, int(size / np.mean(tried))) if tried else 1


def _samples(packing: _Packing, first: int, last: int) -> list[int]:
    samples: list[int] = packing.order.samples(np.arange(first, last)).tolist()
    return samples


def _shard(packing: _Packing, first: int) -> Path:
    return packing.folder / f"shard-{first // packing.per_shard:06d}.tar"


def _write_shard(first: int) -> int:
    """One shard, whole or not at all, and beside it a line for each image left out; runs in a worker. Images dealt with."""
    packing: _Packing = shared_state()
    index = packing.index
    last = min(first + packing.per_shard, len(index))
    path = _shard(packing, first)
    staging, left_out = path.with_suffix(".tmp"), []
    with open(staging, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for position, sample in enumerate(_samples(packing, first, last), first):
            try:
                data = reencode_as_jpeg(index.read(sample), packing.short_side, packing.quality)
            except ImageError as error:
                left_out.append(f"{index.location(sample)}: {error}\n")
                continue
            _add(tar, f"{position:09d}.jpg", data)
            if (label := int(index.entries[sample]["label"])) != NO_LABEL:
                _add(tar, f"{position:09d}.cls", b"%d" % label)
        tar.close()  # writes the end of the archive, which has to be in the file before it is flushed
        file.flush()
        os.fsync(file.fileno())
    if left_out:
        path.with_suffix(LEFT_OUT).write_text("".join(left_out), "utf-8")
    staging.rename(path)
    return last - first


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
