"""The commands that speak to Slurm: ``submit``, ``status``, ``cancel``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from scale_mae.config import load_config


def add_job_commands(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Their arguments; ``add`` makes a parser of a name and a text."""
    sub = add("submit", "Submit a run as a Slurm job that goes on through time limits and preemption (cluster/README.md).")
    sub.add_argument("recipe", metavar="RECIPE")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. train.global_batch=1024")
    sub.add_argument("--nodes", metavar="N|MIN-MAX", help="with a range, each start takes as many as there are")
    sub.add_argument("--gpus-per-node", type=int, metavar="G", help="and processes of a node")
    sub.add_argument("--cpus", type=int, metavar="N", help="processes of a node without GPUs")
    sub.add_argument("--time", metavar="HH:MM:SS", help="limit of one job")
    sub.add_argument("--partition", metavar="P")
    sub.add_argument("--account", metavar="A")
    sub.add_argument("--qos", metavar="Q")
    sub.add_argument("--container", metavar="IMAGE", help="a .sif file (Apptainer), a .sqsh file or registry#name:tag (pyxis)")
    sub.add_argument("--exclude-bad-nodes", action="store_true", default=None, help="that preflight names, at the next start")
    sub.add_argument("--chain", type=int, default=1, metavar="K", help="jobs in a row, where they cannot requeue")
    sub.add_argument("--dry-run", action="store_true", help="print the job script and stop")

    sub = add("status", "How runs stand: state, step, loss, speed, time left, newest checkpoint, restarts.")
    sub.add_argument("run", nargs="?", default="runs", metavar="RUN", help="directory, or folder of such (default: runs)")
    sub.add_argument("--json", action="store_true", help="for programs")

    sub = add("cancel", "Stop a run after a checkpoint, and keep its jobs from starting again.")
    sub.add_argument("run", metavar="RUN")


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
        print(f"scale-mae: warning: {what}", file=sys.stderr)
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


JOB_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {"submit": submit, "status": status, "cancel": cancel}
