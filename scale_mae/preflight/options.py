"""What a preflight checks, and which values it requires."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PreflightOptions:
    """What to look at and what is enough.

    Attributes:
        run_dir: directory that all nodes share.
        local_dir: of each node, for checkpoints that are published later.
        need_gb: free space wanted in both, in GB.
        min_mbps: of ``run_dir``, writing and reading on all nodes at once, in MB/s; None: what is slow is told, and no problem.
        min_gbps: between two nodes, each way, in GB/s.
        timeout: seconds until every process must have come.
        as_json: print one JSON object.
    """

    run_dir: Path
    local_dir: Path | None = None
    need_gb: float = 20.0
    min_mbps: float | None = None
    min_gbps: float = 0.0
    timeout: float = 60.0
    as_json: bool = False

    @property
    def folder(self) -> Path:
        """Where files are written."""
        return self.run_dir / "slurm"

    @property
    def bad_nodes(self) -> Path:
        """Names of bad nodes, one a line; there is no such file when there are none."""
        return self.folder / "bad_nodes"

    @property
    def mark(self) -> Path:
        """Tells a process that has lost rank 0 whether rank 0 ended. Every attempt of a job has its own."""
        words = [os.environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID")]
        return self.folder / f"preflight-{'-'.join(words)}-{os.environ.get('MASTER_PORT', '0')}"
