"""The options of a preflight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scale_mae.slurm import paths


@dataclass(frozen=True)
class PreflightOptions:
    """What preflight checks, and which values it requires.

    Attributes:
        run_dir: The run directory. All nodes must share it.
        local_dir: Directory on each node's own disk (``checkpoint.local_dir``). ``None`` means that there is none.
        min_free_gb: Required free space in both directories, in GB.
        min_storage_speed: Required speed of ``run_dir`` in MB/s, when all nodes write and read at the same time. With ``None``
            slow storage is reported, but is a problem only if one node is much slower than the others.
        min_network_speed: Required speed between two nodes in each direction, in GB/s.
        timeout: Seconds in which every process must join.
        as_json: Whether to print one JSON object instead of one line per finding.
    """

    run_dir: Path
    local_dir: Path | None = None
    min_free_gb: float = 20.0
    min_storage_speed: float | None = None
    min_network_speed: float = 0.0
    timeout: float = 60.0
    as_json: bool = False

    @property
    def folder(self) -> Path:
        """The folder in the run directory to which preflight writes its files."""
        return paths.slurm_dir(self.run_dir)

    @property
    def bad_nodes(self) -> Path:
        """The file with the names of bad nodes, one per line. It does not exist if there are none."""
        return paths.bad_nodes_path(self.run_dir)
