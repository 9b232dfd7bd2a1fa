"""Exports get their name when they are whole: written aside, flushed, checked, renamed. One process at a time."""

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

REPLACED = "replaced"  # in the hidden folder: what ``out`` was until now
DATA = re.compile(r"\.[0-9a-f]{8}\.data")  # ends the name of a file that lies beside ``out``; each export has its own
EXTRA = 1 << 22  # bytes beside the values: headers, programs


def publish(out: Path, nbytes: int, write: Callable[[Path], None], check: Callable[[Path], None]) -> None:
    """Make a file or folder, or leave everything as it was. What had the name before is replaced.

    Args:
        out: its name.
        nbytes: of the values that are written; looked for on the disk first.
        write: makes the file or folder at the path that it is given; may put files beside it that belong to it.
        check: raises a UserError unless that is what it should be; meanwhile the disk is at work.

    Raises:
        UserError: another process is writing it, the disk is full or refuses, or ``check`` says so.
    """
    staging = out.with_name(f".{out.name}.tmp")
    target = staging / out.name
    with exclusive_lock(out.with_name(f".{out.name}.lock"), f"{out} is being written"):
        try:
            _clear(staging, out)
            staging.mkdir(parents=True)
            check_space(staging, nbytes + EXTRA)
            _written(write, target)
            with ThreadPoolExecutor(1, "flush") as thread:
                flushed = thread.submit(_flush_all, staging)
                check(target)
                flushed.result()
            _give_name(staging, target, out)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{out}: not written ({' '.join(str(error).split())})") from None
        finally:
            _clear(staging, out)


def _written(write: Callable[[Path], None], target: Path) -> None:
    try:
        write(target)
    except RuntimeError as error:  # so torch says it, of a full disk too
        check_space(target.parent, EXTRA)
        raise OSError(" ".join(str(error).split())[:200]) from error


def _clear(staging: Path, out: Path) -> None:
    """Delete what is left; a folder that was moved away and not replaced, or its process killed then, gets its name back."""
    with suppress(OSError):  # else it stays where it is
        if (staging / REPLACED).exists() and not out.exists():
            (staging / REPLACED).rename(out)
        shutil.rmtree(staging, ignore_errors=True)


def _give_name(staging: Path, target: Path, out: Path) -> None:
    """Rename what has been flushed; a folder that is replaced steps aside for the moment."""
    if target.is_dir():
        if out.is_dir():
            out.rename(staging / REPLACED)
        target.rename(out)
    else:
        _give_names(target, out)
    flush(out.parent)


def _give_names(target: Path, out: Path) -> None:
    """The file comes after those that it names. No name of theirs is used twice: until then the old file has its own."""
    beside = [path for path in target.parent.iterdir() if path != target]
    try:
        for path in (*beside, target):
            os.replace(path, out.with_name(path.name))
    except OSError:
        for path in beside:
            out.with_name(path.name).unlink(missing_ok=True)
        raise
    older = [p for p in out.parent.iterdir() if p.name.startswith(out.name) and DATA.fullmatch(p.name.removeprefix(out.name))]
    for path in older:
        if path.name not in {new.name for new in beside}:
            path.unlink(missing_ok=True)


def _flush_all(folder: Path) -> None:
    """Bring all files of a folder, and their names in it, to the disk."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in [*files, *({p.parent for p in files})]:
        flush(path)
