"""Render the job script of a run from the template ``cluster/job.sh``."""

from __future__ import annotations

import re
import secrets
import shlex
import sys
from pathlib import Path

from scale_mae.config import PACKAGE_DIR, Config
from scale_mae.runs import history
from scale_mae.slurm import paths
from scale_mae.slurm.site_config import SiteConfig, parse_time_limit

CLUSTER_DIR = PACKAGE_DIR / "cluster" if (PACKAGE_DIR / "cluster").is_dir() else PACKAGE_DIR.parent / "cluster"
TEMPLATE = CLUSTER_DIR / "job.sh"
DEFAULT_LEAD_SECONDS = 120  # time between Slurm's warning and the time limit, until the run has measured a save
PAUSE_SECONDS = 60  # wait before a restart when the same problem would probably occur again at once
# The job exports these variables unless the user's environment or the site file sets them.
DEFAULT_ENVIRONMENT = {
    "NCCL_DEBUG": "WARN",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # a collective that fails or times out ends its process
    "PYTHONFAULTHANDLER": "1",
    "PYTHONUNBUFFERED": "1",
}


def render_job_script(config: Config, site: SiteConfig, node_counts: list[int]) -> str:
    """Return the text of the job script.

    Args:
        config: The configuration of the run. Its run directory is an absolute path.
        site: The settings of the cluster.
        node_counts: The numbers of nodes on which the run can train. The largest is first.
    """
    run_dir = Path(config.run.dir)
    srun_options = [*_cores_per_process(site), *site.srun, *_pyxis_options(config, site)]
    values = {
        "directives": "\n".join(f"#SBATCH {option}" for option in _sbatch_options(run_dir, site, node_counts)),
        "script": shlex.quote(str(paths.job_script_path(run_dir))),
        "run_dir": shlex.quote(str(run_dir)),
        "requeue": str(site.requeue).lower(),
        "preflight": str(site.preflight).lower(),
        "exclude_bad_nodes": str(site.exclude_bad_nodes).lower(),
        "max_restarts_without_progress": str(site.max_restarts_without_progress),
        "pause_seconds": str(PAUSE_SECONDS),
        "cache_dir": _cache_dir(site),
        "preflight_options": _quote_options([*_preflight_local_dir(config), *site.preflight_options]),
        "node_counts": " ".join(map(str, node_counts)),
        "setup": site.setup.rstrip(),
        "environment": _export_lines(site),
        "tasks_per_node": str(site.tasks_per_node),
        "srun_options": _quote_options(srun_options),
        "subcommand": config.run.task,
        "python": shlex.join([*_apptainer_command(config, site), _python(site)]),
    }
    return re.sub(r"@(\w+)@", lambda match: values[match[1]], TEMPLATE.read_text())


def get_warning_lead_seconds(run_dir: Path, time_limit: str) -> int:
    """Return how many seconds before the time limit Slurm sends SIGUSR1.

    This is twice the duration of the slowest save of the run, and a minute. The training process itself stops in time
    (``StopRequest.lead_seconds``). Slurm's signal is a second warning in case the clocks disagree.
    """
    try:
        saves = [event.get("seconds") for event in history.read(run_dir) if event["event"] == "checkpoint"]
    except OSError:
        saves = []
    durations = [seconds for seconds in saves if isinstance(seconds, (int, float))]
    lead = round(2 * max(durations) + 60) if durations else DEFAULT_LEAD_SECONDS
    limit = parse_time_limit(time_limit)
    return min(lead, limit // 4) if limit else lead


def _sbatch_options(run_dir: Path, site: SiteConfig, node_counts: list[int]) -> list[str]:
    fewest, most = min(node_counts), max(node_counts)
    numbers = {"gpus-per-node": site.gpus_per_node, "cpus-per-task": site.cpus_per_task}
    names = {"partition": site.partition, "account": site.account, "qos": site.qos}
    return [
        f"--job-name={shlex.quote(run_dir.name)}",
        f"--nodes={fewest}-{most}" if most > fewest else f"--nodes={most}",
        f"--ntasks-per-node={site.tasks_per_node}",
        *(f"--{option}={number}" for option, number in numbers.items() if number),
        f"--time={site.time}",
        *(f"--{option}={shlex.quote(name)}" for option, name in names.items() if name),
        f"--signal=USR1@{get_warning_lead_seconds(run_dir, site.time)}",
        "--requeue" if site.requeue else "--no-requeue",
        "--open-mode=append",
        f"--output={shlex.quote(str(paths.job_log_path(run_dir, '%j')))}",
        f"--chdir={shlex.quote(str(Path.cwd()))}",
        *site.sbatch,
    ]


def _quote_options(options: list[str]) -> str:
    return "".join(f" {shlex.quote(option)}" for option in options)


def _cache_dir(site: SiteConfig) -> str:
    # Nobody can guess this name and put files there first. A container sees /tmp, but not the other folders.
    parent = "/tmp" if site.container.image else "${SLURM_TMPDIR:-${TMPDIR:-/tmp}}"
    return f"{parent}/scale-mae-{secrets.token_hex(8)}"


def _preflight_local_dir(config: Config) -> list[str]:
    return ["--local-dir", config.checkpoint.local_dir] if config.checkpoint.local_dir else []


def _export_lines(site: SiteConfig) -> str:
    lines = [f'export {name}="${{{name}:-{value}}}"' for name, value in DEFAULT_ENVIRONMENT.items() if name not in site.env]
    if site.container.image:  # the packages of the host's Python do not fit the Python in the image
        lines = ["unset PYTHONPATH", "export PYTHONNOUSERSITE=1", *lines]
    return "\n".join(lines + [f"export {name}={shlex.quote(str(value))}" for name, value in site.env.items()])


def _cores_per_process(site: SiteConfig) -> list[str]:
    # since Slurm 22.05, srun does not inherit this option from the job
    return [f"--cpus-per-task={site.cpus_per_task}"] if site.cpus_per_task else []


def _python(site: SiteConfig) -> str:
    return "python3" if site.container.image else sys.executable


def _mounts(config: Config, site: SiteConfig) -> list[str]:
    local_dir = [config.checkpoint.local_dir] if config.checkpoint.local_dir else []
    always = dict.fromkeys([config.run.dir, str(Path.cwd()), *local_dir])
    return [mount if ":" in mount else f"{mount}:{mount}" for mount in [*always, *site.container.mounts]]


def _pyxis_options(config: Config, site: SiteConfig) -> list[str]:
    # These are options of srun, because options of sbatch would not apply to every job step.
    if site.container.chosen_runtime != "pyxis":
        return []
    return [
        f"--container-image={site.container.resolved_image}",
        f"--container-mounts={','.join(_mounts(config, site))}",
        f"--container-workdir={Path.cwd()}",
    ]


def _apptainer_command(config: Config, site: SiteConfig) -> list[str]:
    if site.container.chosen_runtime != "apptainer":
        return []
    gpus = ["--nv"] if site.gpus_per_node else []
    binds = [word for mount in _mounts(config, site) for word in ("--bind", mount)]
    return ["apptainer", "exec", *gpus, *binds, "--pwd", str(Path.cwd()), site.container.resolved_image]
