"""The subcommands ``submit``, ``status`` and ``cancel``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from scale_mae.config import load_config
from scale_mae.system.command_line import Command, add_recipe_arguments, warn

# options of ``submit`` that replace keys of the site file
SITE_OPTIONS = ("nodes", "gpus_per_node", "cpus", "time", "partition", "account", "qos", "exclude_bad_nodes")


def _add_submit_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser, "train.global_batch=1024")
    add = parser.add_argument
    add("--nodes", metavar="N|MIN-MAX", help="number of nodes; with a range, each start uses as many as Slurm offers")
    add("--gpus-per-node", type=int, metavar="N", help="GPUs per node; one process runs on each GPU")
    add("--cpus", type=int, metavar="N", help="processes per node, for nodes without GPUs")
    add("--time", metavar="LIMIT", help="time limit of one job: minutes, HH:MM:SS or D-HH:MM:SS")
    add("--partition", metavar="NAME", help="Slurm partition")
    add("--account", metavar="NAME", help="Slurm account")
    add("--qos", metavar="NAME", help="Slurm quality of service")
    add("--container", metavar="IMAGE", help="a .sif file (Apptainer), or a .sqsh file or registry#name:tag (pyxis)")
    add(
        "--exclude-bad-nodes",
        action="store_true",
        default=None,
        help="exclude the nodes that preflight reports as bad from the next start",
    )
    add(
        "--chain",
        type=int,
        default=1,
        metavar="N",
        help="submit N jobs, each of which waits for the previous one; for clusters where jobs cannot requeue themselves",
    )
    add("--dry-run", action="store_true", help="print the job script and submit nothing")


def _add_status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", nargs="?", default="runs", metavar="RUN", help="run directory, or folder of run directories (default: runs)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_cancel_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory")


def _submit(args: argparse.Namespace) -> int:
    from scale_mae.slurm.paths import job_log_path, job_script_path
    from scale_mae.slurm.site_config import load_site_config
    from scale_mae.slurm.submit import find_missing_paths, prepare_job, submit_job

    config = load_config(args.recipe, args.overrides)
    options = {key: getattr(args, key) for key in SITE_OPTIONS} | {"image": args.container}
    if args.chain > 1:
        options["requeue"] = False
    job = prepare_job(config, load_site_config(Path(config.run.dir), options))
    for warning in find_missing_paths(job.config):
        warn(warning)
    if args.dry_run:
        print(job.script, end="")
        return 0
    for number in submit_job(job, args.chain):
        print(f"Submitted job {number}. Output: {job_log_path(job.run_dir, number)}")
    print(f"Run directory: {job.run_dir} (log.txt contains messages, log.jsonl contains metrics)")
    print(f"Job script:    {job_script_path(job.run_dir)}")
    print(f"Show status:   scale-mae status {config.run.dir}")
    print(f"Cancel:        scale-mae cancel {config.run.dir}")
    return 0


def _status(args: argparse.Namespace) -> int:
    from scale_mae.slurm.status import find_runs, get_run_status, print_status

    runs = [get_run_status(run) for run in find_runs(Path(args.run))]
    if args.json:
        print(json.dumps([asdict(run) for run in runs], indent=2, default=str))
    else:
        print_status(runs)
    return 0


def _cancel(args: argparse.Namespace) -> int:
    from scale_mae.slurm.cancel import cancel_run

    print(cancel_run(Path(args.run)))
    return 0


SLURM_COMMANDS = (
    Command(
        name="submit",
        group="slurm",
        summary="Submit a run as a Slurm job that resumes after time limits and preemption.",
        description="Options that are not given have the values of site.yaml; see docs/guides/slurm.md.",
        example="scale-mae submit vit_base data.source=imagenet.index --nodes 2 --gpus-per-node 8 --dry-run",
        add_arguments=_add_submit_arguments,
        run=_submit,
    ),
    Command(
        name="cancel",
        group="slurm",
        summary="Save a checkpoint of a run, stop it, and keep its jobs from restarting.",
        example="scale-mae cancel runs/vit_base",
        add_arguments=_add_cancel_arguments,
        run=_cancel,
    ),
    Command(
        name="status",
        group="runs",
        summary="Show state, step, loss, speed, time left, newest checkpoint and restarts.",
        example="scale-mae status runs",
        add_arguments=_add_status_arguments,
        run=_status,
    ),
)
