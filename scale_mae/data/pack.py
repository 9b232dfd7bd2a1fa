"""Packs images as small, clean, shuffled JPEGs into tar shards, for machines whose decoders limit the training speed.

The index and the settings alone determine the content of each shard. Workers can therefore write the shards in parallel, and
an interrupted run continues with the missing shards.
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

TRIAL_IMAGES = 100  # encoded first, to estimate the size of an image
SETTINGS_FILE = "packing.json"
SKIPPED_SUFFIX = ".skipped.txt"
CONTINUE = "Run the same command again to continue."


@dataclass(frozen=True)
class PackResult:
    """The result of packing.

    Attributes:
        index: The index of the shards.
        skipped: One line for each image that could not be packed.
    """

    index: Index
    skipped: Sequence[str]


@dataclass(frozen=True)
class _Packing:
    """The state that the worker processes share.

    Attributes:
        index: The images to pack.
        folder: The folder of the shards.
        order: Shuffles the images.
        short_side: Largest short side in pixels.
        quality: JPEG quality.
        per_shard: Images per shard.
    """

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
    """Re-encode all usable images of a source into shuffled tar shards in the WebDataset convention, and index them.

    Args:
        source: An index, or any source of images.
        out: Folder for ``shard-000000.tar`` and so on, ``classes.txt`` and ``data.index``.
        short_side: Larger images are scaled down until their short side has this many pixels.
        quality: JPEG quality, 1 to 95.
        shard_mb: Approximate size of a shard in megabytes (10^6 bytes).
        seed: Seed of the shuffled order.
        workers: Number of processes; one per core by default.
        progress: Called with the number of packed images and the number of all images.

    Raises:
        DataError: The source, an option or the folder cannot be used, or a shard cannot be written.
    """
    if not (short_side > 0 and 1 <= quality <= 95 and 0 < shard_mb < math.inf):
        raise DataError(
            f"--short-side {short_side} --quality {quality} --shard-mb {shard_mb:g}: a value is out of range. Set a short side "
            "above 0, a quality from 1 to 95 and a shard size above 0."
        )
    folder, index, workers = Path(out), open_index(source), workers or available_cores()
    settings = {"data": index.digest, "short_side": short_side, "quality": quality, "shard_mb": shard_mb, "seed": seed}
    packing = _Packing(index, folder, SamplePlan(seed, len(index), 1), short_side, quality, 1)
    try:
        with exclusive_lock(folder / f"{INDEX_NAME}.lock", f"{folder} is being packed"):
            packing = replace(packing, per_shard=_prepare_folder(packing, settings))
            _write_missing_shards(packing, workers, progress or (lambda done, total: None))
            files = sorted(folder.glob(f"*{SKIPPED_SUFFIX}"))
            skipped = [line for path in files for line in path.read_text("utf-8").splitlines()]
            packed = build_index(str(folder), folder / INDEX_NAME, workers=workers)
    except BrokenProcessPool:
        raise DataError(
            f"{source}: a packing process was killed, by an image or by a lack of memory. "
            f"`scale-mae index {source}` finds such images. {CONTINUE}"
        ) from None
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error}). {CONTINUE}") from None
    if len(packed) + len(skipped) != len(index):
        raise DataError(
            f"{folder}: contains {len(packed)} images and {len(skipped)} were skipped, but the source has {len(index)} images. "
            "Choose a new folder."
        )
    if not existing_index(source):  # the user of an index already knows its quarantine
        skipped += [f"{location}: {cause}" for location, cause in index.quarantined_images()]
    return PackResult(packed, skipped)


def _prepare_folder(packing: _Packing, settings: dict[str, Any]) -> int:
    """Check the folder, or prepare it. Return the images per shard, which must not change when the packing continues."""
    folder, file = packing.folder, packing.folder / SETTINGS_FILE
    if file.exists():
        try:
            previous = json.loads(file.read_text("utf-8"))
            per_shard = int(previous.pop("images_per_shard"))
        except (ValueError, KeyError):
            raise DataError(f"{file}: damaged. Choose another folder.") from None
        if previous != settings:
            raise DataError(f"{folder}: contains shards of other images or settings ({previous}). Choose another folder.")
        return per_shard
    if any(path.name not in (CLASSES_FILE, f"{INDEX_NAME}.lock") for path in folder.iterdir()):
        raise DataError(f"{folder}: not empty. Choose another folder.")
    classes = packing.index.classes
    if any("\n" in name for name in classes):
        raise DataError(f"{packing.index.source}: a class name contains a line break. Rename the class.")
    if classes:
        (folder / CLASSES_FILE).write_text("".join(f"{name}\n" for name in classes), "utf-8", errors="surrogateescape")
    per_shard = _images_per_shard(packing, settings["shard_mb"] * 1e6)
    staging = file.with_suffix(".tmp")
    staging.write_text(json.dumps(settings | {"images_per_shard": per_shard}), "utf-8")
    staging.rename(file)
    return per_shard


def _write_missing_shards(packing: _Packing, workers: int, progress: Progress) -> None:
    total = len(packing.index)
    missing = [first for first in range(0, total, packing.per_shard) if not _shard_path(packing, first).exists()]
    done = total - sum(min(packing.per_shard, total - first) for first in missing)
    with map_unordered(_write_shard, missing, processes=workers, max_pending=workers, state=packing) as results:
        for images in results:
            done += images
            progress(done, total)


def _images_per_shard(packing: _Packing, shard_bytes: float) -> int:
    """Estimate the number of images in a shard from the first images."""
    sizes = []
    for sample in _samples(packing, 0, min(TRIAL_IMAGES, len(packing.index))):
        try:
            data = reencode_as_jpeg(packing.index.read(sample), packing.short_side, packing.quality)
        except ImageError:
            continue
        sizes.append(512 * (3 + math.ceil(len(data) / 512)))  # headers of image and label, a block for the label, the image
    return max(1, int(shard_bytes / np.mean(sizes))) if sizes else 1


def _samples(packing: _Packing, first: int, last: int) -> list[int]:
    samples: list[int] = packing.order.samples(np.arange(first, last)).tolist()
    return samples


def _shard_path(packing: _Packing, first: int) -> Path:
    return packing.folder / f"shard-{first // packing.per_shard:06d}.tar"


def _write_shard(first: int) -> int:
    """Write one shard atomically, and a file that names its skipped images. This runs in a worker.

    Returns:
        The number of packed and skipped images.
    """
    packing: _Packing = shared_state()
    index = packing.index
    last = min(first + packing.per_shard, len(index))
    path = _shard_path(packing, first)
    staging, skipped = path.with_suffix(".tmp"), []
    with open(staging, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for position, sample in enumerate(_samples(packing, first, last), first):
            try:
                data = reencode_as_jpeg(index.read(sample), packing.short_side, packing.quality)
            except ImageError as error:
                skipped.append(f"{index.location(sample)}: {error}\n")
                continue
            _add(tar, f"{position:09d}.jpg", data)
            if (label := int(index.entries[sample]["label"])) != NO_LABEL:
                _add(tar, f"{position:09d}.cls", b"%d" % label)
        tar.close()  # writes the end of the archive, which must be in the file before the flush
        file.flush()
        os.fsync(file.fileno())
    if skipped:
        path.with_suffix(SKIPPED_SUFFIX).write_text("".join(skipped), "utf-8")
    staging.rename(path)
    return last - first


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
