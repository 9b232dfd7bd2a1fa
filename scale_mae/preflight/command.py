"""The subcommand ``preflight``. This module imports no torch, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path

from scale_mae.preflight.options import PreflightOptions
from scale_mae.system.command_line import Command

ENVIRONMENT = {
    # NCCL's watchdog must not kill the process that reports the problem.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}


def add_preflight_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one option for each attribute of :class:`PreflightOptions`."""
    add = parser.add_argument
    add("--run-dir", required=True, type=Path, metavar="DIR", help="run directory, which all nodes share")
    add("--local-dir", type=Path, metavar="DIR", help="folder on each node's own disk (checkpoint.local_dir)")
    add("--min-free-gb", type=float, default=20.0, metavar="GB", help="required free space in both (default: %(default)g)")
    add(
        "--min-storage-speed",
        type=float,
        metavar="MB/S",
        help="required write and read speed of each node in the run directory (default: only compare the nodes)",
    )
    add(
        "--min-network-speed",
        type=float,
        default=0.0,
        metavar="GB/S",
        help="required speed between two nodes in each direction (default: only compare the nodes)",
    )
    add(
        "--timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds in which all processes must join (default: %(default)g)",
    )
    add("--json", action="store_true", dest="as_json", help="print JSON")


def _preflight(args: argparse.Namespace) -> int:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # torch prints a page about a timeout; preflight prints one line
    os.environ |= ENVIRONMENT
    from scale_mae.preflight.stages import run_preflight
    from scale_mae.preflight.timeout import has_hanging_actions

    exit_code = run_preflight(PreflightOptions(**{f.name: getattr(args, f.name) for f in fields(PreflightOptions)}))
    if has_hanging_actions():
        sys.stdout.flush()
        os._exit(exit_code)  # a normal exit would wait for the threads that hang
    return exit_code


PREFLIGHT_COMMAND = Command(
    name="preflight",
    group="slurm",
    summary="Check all nodes of a job before it trains.",
    description="Start it like training, with one process per GPU. It writes the names of bad nodes to DIR/slurm/bad_nodes.",
    example="srun scale-mae preflight --run-dir runs/vit_base",
    add_arguments=add_preflight_arguments,
    run=_preflight,
)
