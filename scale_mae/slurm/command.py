"""The commands that speak to Slurm: ``submit``, ``status``, ``cancel``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from scale_mae.config import load_config
from scale_mae.system.command_line import Command, add_recipe_arguments, warn


def _add_submit_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser, "train.global_batch=1024")
    add = parser.add_argument
    add("--nodes", metavar="N|MIN-MAX", help="number of nodes; with a range, each start takes as many as are free")
    add("--gpus-per-node", type=int, metavar="G", help="GPUs per node, with one process each")
    add("--cpus", type=int, metavar="N", help="processes per node without GPUs")
    add("--time", metavar="HH:MM:SS", help="time limit of one job")
    add("--partition", metavar="P", help="Slurm partition")
    add("--account", metavar="A", help="Slurm account")
    add("--qos", metavar="Q", help="Slurm quality of service")
    add("--container", metavar="IMAGE", help="a .sif file (Apptainer), a .sqsh file or registry#name:tag (pyxis)")
    add("--exclude-bad-nodes", action="store_true", default=None, help="exclude nodes that preflight reports at the next start")
    add("--chain", type=int, default=1, metavar="K", help="submit K jobs in a row, for clusters that cannot requeue")
    add("--dry-run", action="store_true", help="print the job script and stop")


def _add_status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", nargs="?", default="runs", metavar="RUN", help="run directory, or a folder of them (default: runs)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_cancel_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory")


def submit(args: argparse.Namespace) -> int:
    """``scale-mae submit``."""
    from scale_mae.slurm.site import load_site
    from scale_mae.slurm.submit import prepare, script_path, submit, unseen

    config = load_config(args.recipe, args.overrides)
    keys = ("nodes", "gpus_per_node", "cpus", "time", "partition", "account", "qos", "exclude_bad_nodes")
    options = {key: getattr(args, key) for key in keys} | {"image": args.container}
    if args.chain > 1:
        options["requeue"] = False
    job = prepare(config, load_site(Path(config.run.dir), options))
    for what in unseen(job.config):
        warn(what)
    if args.dry_run:
        print(job.script, end="")
        return 0
    for number in submit(job, args.chain):
        print(f"job {number}: {job.run_dir}/slurm/job-{number}.log")
    print(f"run directory: {job.run_dir} (log.txt, log.jsonl); script: {script_path(job.run_dir)}")
    print(f"scale-mae status {config.run.dir}    scale-mae cancel {config.run.dir}")
    return 0


def status(args: argparse.Namespace) -> int:
    """``scale-mae status``."""
    from scale_mae.slurm.status import find_runs, run_status, show

    found = [run_status(run) for run in find_runs(Path(args.run))]
    if args.json:
        print(json.dumps([asdict(one) for one in found], indent=2, default=str))
    else:
        show(found)
    return 0


def cancel(args: argparse.Namespace) -> int:
    """``scale-mae cancel``."""
    from scale_mae.slurm.status import cancel

    print(cancel(Path(args.run)))
    return 0


SLURM_COMMANDS = (
    Command(
        name="submit",
        group="slurm",
        summary="Submit a run as a Slurm job that continues after time limits and preemption.",
        description="See docs/guides/slurm.md.",
        example="scale-mae submit vit_base data.source=imagenet.index --nodes 2 --gpus-per-node 8 --dry-run",
        add_arguments=_add_submit_arguments,
        run=submit,
    ),
    Command(
        name="cancel",
        group="slurm",
        summary="Stop a run after a checkpoint and keep its jobs from starting again.",
        example="scale-mae cancel runs/vit_base",
        add_arguments=_add_cancel_arguments,
        run=cancel,
    ),
    Command(
        name="status",
        group="runs",
        summary="Show state, step, loss, speed, time left, newest checkpoint and restarts of runs.",
        example="scale-mae status runs",
        add_arguments=_add_status_arguments,
        run=status,
    ),
)
