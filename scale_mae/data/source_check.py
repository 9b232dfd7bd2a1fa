"""Whether a source is there, from names alone: nothing is opened, and no numpy is needed, so that a login node can ask."""

from __future__ import annotations

import os
import re

from scale_mae.config import PACKAGE_DIR
from scale_mae.data.dataset_layouts import LAYOUTS, locate
from scale_mae.data.errors import DataError
from scale_mae.data.file_lists import SourceLocation

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
DEMO = PACKAGE_DIR / "demo_data"


def check_source(source: str) -> SourceLocation:
    """Where a source's images are told of: a folder, tar shards or a file that exist.

    Raises:
        DataError: nothing there, or something missing.
        OSError: a folder cannot be looked into.
    """
    place = locate(source) or SourceLocation(source)
    path = place.path
    if are_shards(path):
        shard_paths(path)
    elif not os.path.exists(path):
        if prefix := re.match(r"\w+(?=:)", path):
            raise DataError(f"{path}: no such folder, and no layout {prefix[0]}; known are demo, {', '.join(LAYOUTS)}")
        raise DataError(f"{path}: no such folder or file; name class folders, tar shards, a list or demo:train")
    return place


def are_shards(path: str) -> bool:
    """Whether a path means tar shards themselves: one, a brace list, or those that are shipped."""
    return not os.path.isdir(path) and (path.endswith(TAR_SUFFIXES) or path.startswith("demo:"))


def shard_paths(source: str) -> list[str]:
    """Absolute paths of the shards that a source means.

    Raises:
        DataError: one is missing.
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
        raise DataError(f"{missing[0] if missing else source}: no such shard; check the source {source}")
    return [os.path.abspath(path) for path in paths]
