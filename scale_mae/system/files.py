"""Files as the disk has them: their checksums, getting them there, and the room for them."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal."""
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 18))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_space(folder: Path, needed: int) -> None:
    """Whether the disk of a folder has ``needed`` bytes.

    Raises:
        OSError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{needed / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free on its disk")


def checkpoint_bytes(parameters: int, precision: str, stage: int) -> tuple[int, int]:
    """What a checkpoint takes at most, and what of it the first process alone writes, in bytes.

    Args:
        parameters: of the model.
        precision: ``train.precision``.
        stage: of ZeRO; without it the first process writes everything.
    """
    module = parameters * (4 if precision == "fp32" else 2)
    nbytes = module + parameters * 12  # masters and two moments
    return nbytes, module if stage else nbytes
