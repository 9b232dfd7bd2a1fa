"""The command: its options, and how its process ends. Imports no torch, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path

from scale_mae.preflight.options import PreflightOptions
from scale_mae.system.command_line import Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, named as the attributes of :class:`PreflightOptions`."""
    add = parser.add_argument
    add("--run-dir", required=True, type=Path, metavar="DIR", help="folder shared by all nodes")
    add("--local-dir", type=Path, metavar="DIR", help="folder on each node's own disk (checkpoint.local_dir)")
    add("--need-gb", type=float, default=20.0, metavar="GB", help="required free space in both (default: %(default)g)")
    add("--min-mbps", type=float, metavar="MB/S", help="required write speed of each node, all at once (default: compare only)")
    add("--min-gbps", type=float, default=0.0, metavar="GB/S", help="required speed between two nodes (default: compare only)")
    add("--timeout", type=float, default=60.0, metavar="S", help="seconds to wait for all processes (default: %(default)g)")
    add("--json", action="store_true", dest="as_json", help="print JSON")


def run_preflight(args: argparse.Namespace) -> int:
    """Run it; where a check still hangs, ends the process at once."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # torch tells a time-out in a page; we do in a line
    os.environ |= {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "TORCH_NCCL_ENABLE_MONITORING": "0",
    }  # they would kill who is to tell
    from scale_mae.preflight.checks import preflight
    from scale_mae.preflight.rendezvous import hanging

    code = preflight(PreflightOptions(**{field.name: getattr(args, field.name) for field in fields(PreflightOptions)}))
    if hanging():
        sys.stdout.flush()
        os._exit(code)  # an orderly end would wait for what does not answer
    return code


PREFLIGHT_COMMAND = Command(
    name="preflight",
    group="slurm",
    summary="Check all nodes of a job just before it trains.",
    description="The names of bad nodes go to DIR/slurm/bad_nodes.",
    example="srun scale-mae preflight --run-dir runs/vit_base",
    add_arguments=_add_arguments,
    run=run_preflight,
)
