"""Writes an export atomically: write to a hidden folder, flush, check, rename. A lock admits one process at a time."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import safetensors

from scale_mae.config import UserError
from scale_mae.system.files import check_space, flush
from scale_mae.system.lock import exclusive_lock

REPLACED = "replaced"  # contains the previous folder, inside the hidden folder while it is being replaced
EXTERNAL_DATA = re.compile(r"\.[0-9a-f]{8}\.data")  # suffix of the file with the tensors of a large ONNX export
OVERHEAD_BYTES = 1 << 22  # for headers and graphs


def write_atomically(out: Path, nbytes: int, write: Callable[[Path], None], check: Callable[[Path], None]) -> None:
    """Write a file or folder and replace the previous one, or change nothing if anything fails.

    Args:
        out: The file or folder.
        nbytes: Size of the tensors to write. Free space is checked first.
        write: Writes the file or folder at the path that it receives. It may write more files next to it.
        check: Raises a UserError if the result is wrong. It runs while the disk is being flushed.

    Raises:
        UserError: Another process writes ``out``, the disk is full or cannot be written, or ``check`` failed.
    """
    staging = out.with_name(f".{out.name}.tmp")
    target = staging / out.name
    with exclusive_lock(out.with_name(f".{out.name}.lock"), f"{out} is being written"):
        try:
            _clean_up(staging, out)
            staging.mkdir(parents=True)
            check_space(staging, nbytes + OVERHEAD_BYTES)
            _write(write, target)
            with ThreadPoolExecutor(1, "flush") as thread:
                flushed = thread.submit(_flush_all, staging)
                check(target)
                flushed.result()
            _move_into_place(staging, target, out)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{out}: not written ({' '.join(str(error).split())}).") from None
        finally:
            _clean_up(staging, out)


def _write(write: Callable[[Path], None], target: Path) -> None:
    try:
        write(target)
    except RuntimeError as error:  # torch raises it for a full disk as well
        check_space(target.parent, OVERHEAD_BYTES)
        raise OSError(" ".join(str(error).split())[:200]) from error


def _clean_up(staging: Path, out: Path) -> None:
    """Delete the hidden folder. Restore a previous folder that was moved away and not replaced, even by a killed process."""
    with suppress(OSError):  # then the previous folder stays in the hidden one
        if (staging / REPLACED).exists() and not out.exists():
            (staging / REPLACED).rename(out)
        shutil.rmtree(staging, ignore_errors=True)


def _move_into_place(staging: Path, target: Path, out: Path) -> None:
    """Rename the result to its final name. A previous folder moves into the hidden folder first."""
    if target.is_dir():
        if out.is_dir():
            out.rename(staging / REPLACED)
        target.rename(out)
    else:
        _move_files(target, out)
    flush(out.parent)


def _move_files(target: Path, out: Path) -> None:
    """Move the external files first, then the file that refers to them, then delete the external files of the previous one.

    External files have unique names, so the previous file stays complete until it is replaced.
    """
    external = [path for path in target.parent.iterdir() if path != target]
    try:
        for path in (*external, target):
            os.replace(path, out.with_name(path.name))
    except OSError:
        for path in external:
            out.with_name(path.name).unlink(missing_ok=True)
        raise
    kept = {path.name for path in external}
    for path in list(out.parent.iterdir()):
        is_external = path.name.startswith(out.name) and EXTERNAL_DATA.fullmatch(path.name.removeprefix(out.name))
        if is_external and path.name not in kept:
            path.unlink(missing_ok=True)


def _flush_all(folder: Path) -> None:
    """Flush all files of a folder, and the directory entries, to the disk."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in [*files, *({p.parent for p in files})]:
        flush(path)
