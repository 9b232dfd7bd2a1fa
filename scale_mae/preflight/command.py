"""The command: its options, and how its process ends. Imports no torch, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Demands:
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``scale-mae preflight``, named as the attributes of :class:`Demands`."""
    add = parser.add_argument
    add("--run-dir", required=True, type=Path, metavar="DIR", help="shared by all nodes")
    add("--local-dir", type=Path, metavar="DIR", help="of each node (checkpoint.local_dir)")
    add("--need-gb", type=float, default=20.0, metavar="GB", help="free in both (default: %(default)g)")
    add(
        "--min-mbps", type=float, metavar="MB/S", help="of the run directory, each of all nodes at once (default: compare only)"
    )
    add("--min-gbps", type=float, default=0.0, metavar="GB/S", help="between two nodes, each way (default: compare only)")
    add("--timeout", type=float, default=60.0, metavar="S", help="for all processes to come (default: %(default)g)")
    add("--json", action="store_true", dest="as_json", help="for programs")


def run_command(args: argparse.Namespace) -> int:
    """Run it; where a check still hangs, ends the process at once."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # torch tells a time-out in a page; we do in a line
    os.environ |= {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "TORCH_NCCL_ENABLE_MONITORING": "0",
    }  # they would kill who is to tell
    from scale_mae.preflight.checks import preflight
    from scale_mae.preflight.rendezvous import hanging

    code = preflight(Demands(**{field.name: getattr(args, field.name) for field in fields(Demands)}))
    if hanging():
        sys.stdout.flush()
        os._exit(code)  # an orderly end would wait for what does not answer
    return code
