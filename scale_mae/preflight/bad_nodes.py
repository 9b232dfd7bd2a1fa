"""The list of bad nodes in the run directory.

Preflight only writes this list. The job script (``cluster/job.sh``) reads it and excludes the nodes from later starts if the
site file has ``exclude_bad_nodes: true``.
"""

from __future__ import annotations

import os
from pathlib import Path

from scale_mae.preflight.options import PreflightOptions


def write_bad_nodes(options: PreflightOptions, names: list[str]) -> None:
    """Write the names of bad nodes, one per line. Delete the file if there are none.

    Raises:
        OSError: The run directory cannot be written.
    """
    if names:
        replace_file(options.bad_nodes, "".join(f"{name}\n" for name in names))
    else:
        options.bad_nodes.unlink(missing_ok=True)


def replace_file(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new text, and nothing in between.

    Raises:
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    staging.write_text(text)
    staging.rename(path)
