"""Resolves a source to paths and checks that they exist. It opens no image and needs no numpy, so a login node can use it."""

from __future__ import annotations

import os
import re

from scale_mae.config import PACKAGE_DIR
from scale_mae.data.dataset_layouts import LAYOUTS, SourceLocation, resolve_layout
from scale_mae.data.errors import DataError

DEMO = PACKAGE_DIR / "demo_data"
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


def check_source(source: str) -> SourceLocation:
    """Resolve a source to a folder, tar shards or a file, and check that they exist.

    Raises:
        DataError: A path is missing.
        OSError: A folder cannot be read.
    """
    location = resolve_layout(source) or SourceLocation(source)
    path = location.path
    if is_shards(path):
        shard_paths(path)
    elif not os.path.exists(path):
        if prefix := re.match(r"\w+(?=:)", path):
            names = ", ".join(LAYOUTS)
            raise DataError(f"{path}: no such folder, and no data set layout {prefix[0]}. The layouts are demo, {names}.")
        raise DataError(f"{path}: no such folder or file. Set the source to class folders, tar shards, a list or demo:train.")
    return location


def is_shards(path: str) -> bool:
    """Whether a path means tar shards: one shard, a brace list, or the shards that this package contains."""
    return not os.path.isdir(path) and (path.endswith(TAR_SUFFIXES) or path.startswith("demo:"))


def shard_paths(source: str) -> list[str]:
    """Return the absolute paths of the shards that a source means.

    Raises:
        DataError: A shard is missing.
    """
    if source.startswith("demo:"):
        paths = sorted(map(str, DEMO.glob(f"{source.removeprefix('demo:')}-*.tar.gz")))
    elif braces := re.search(r"\{(\d+)\.\.(\d+)\}", source):
        first, last = braces.groups()
        paths = [source.replace(braces.group(), f"{n:0{len(first)}d}") for n in range(int(first), int(last) + 1)]
    else:
        paths = [source]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing or not paths:
        raise DataError(f"{missing[0] if missing else source}: no such shard. Check the source {source}.")
    return [os.path.abspath(path) for path in paths]
