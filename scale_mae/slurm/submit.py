"""A run becomes a Slurm job: checked, code and config set aside, one script written, submitted."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from scale_mae.checkpoint.store import checkpoints
from scale_mae.config import PACKAGE_DIR, SHIPPED_CONFIGS, Config, ConfigError, saved_config
from scale_mae.data.errors import DataError, escape_unprintable
from scale_mae.data.source_check import check_source
from scale_mae.slurm.queue import FOLDER, SCRIPT, STOP, SlurmError, call, clean_environment, queued
from scale_mae.slurm.site import Site, seconds

CLUSTER = PACKAGE_DIR / "cluster" if (PACKAGE_DIR / "cluster").is_dir() else PACKAGE_DIR.parent / "cluster"
LEAD = 120  # seconds before the time limit at which Slurm warns a run whose saves have not been measured
SAVED = re.compile(r" saved .* in ([\d.]+) s")
# Variables that a job has unless its environment or the site says otherwise.
ENVIRONMENT = {
    "NCCL_DEBUG": "WARN",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # a collective that fails or times out ends its process
    "PYTHONFAULTHANDLER": "1",
    "PYTHONUNBUFFERED": "1",
}


# Python puts the folder of a script before all others, and with -m the present one, where another scale_mae may lie.
RUN_PY = """\
import runpy

runpy.run_module("scale_mae", run_name="__main__", alter_sys=True)
"""
PAUSE = 60


@dataclass(frozen=True)
class Job:
    """A job to be submitted.

    Attributes:
        config: with the run directory as an absolute path.
        site: where and how.
        script: text of the job script.
    """

    config: Config
    site: Site
    script: str

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self.config.run.dir)


def prepare(config: Config, site: Site) -> Job:
    """Check a run for the nodes it may get, and render its script. Nothing is written.

    Raises:
        UserError: a batch that does not divide, another config in the run directory, or a wrong DeepSpeed file.
    """
    run_dir = Path(config.run.dir).absolute()
    if odd := re.search(r"[%\\\n|]", str(run_dir)):
        raise SlurmError(f"run.dir={run_dir}: Slurm gives {odd[0]!r} in the name of a file a meaning; choose another run.dir")
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(run_dir)})})
    config.deepspeed_json()
    counts = node_counts(config, site)
    before = saved_config(run_dir / "config.yaml")
    if before and (run_dir / "checkpoints").is_dir() and (differences := before.differences(config)):
        raise SlurmError(
            f"{run_dir} holds a run of another config ({differences[0]}); choose another run.dir or the same values"
        )
    return Job(config, site, render(config, site, counts))


def unseen(config: Config) -> list[str]:
    """What a config names and this host does not see, a line each. The nodes may: their disks can be others than this one's."""
    found = []
    for key, source in {"data.source": config.data.source, "classify.val_source": config.classify.val_source}.items():
        try:
            if source is not None:
                check_source(source)
        except DataError as error:
            found.append(f"{key}: {error}")
        except OSError as error:
            found.append(f"{key}: {error.filename}: cannot be read ({error.strerror})")
    weights = config.model.init_from
    if weights and not os.path.exists(weights) and not checkpoints(Path(config.run.dir)):  # a checkpoint goes before them
        found.append(f"model.init_from={weights}: no such file or folder")
    advice = "not seen from this host; if the nodes do not have it either, scale-mae cancel the run and put it right"
    return [escape_unprintable(f"{what} ({advice})") for what in found]


def script_path(run_dir: Path) -> Path:
    """Where the job script of a run lies."""
    return run_dir / FOLDER / SCRIPT


def node_counts(config: Config, site: Site) -> list[int]:
    """Numbers of nodes over which the batch divides, the largest first.

    Raises:
        ConfigError: none.
    """
    least, most = site.node_range
    fitting = []
    for nodes in range(most, least - 1, -1):
        try:
            config.accumulation(nodes * site.tasks_per_node)
            fitting.append(nodes)
        except ConfigError:
            if least == most:
                raise
    if not fitting:
        config.accumulation(most * site.tasks_per_node)
    return fitting


def lead_seconds(run_dir: Path, time: str) -> int:
    """How long before the time limit Slurm sends SIGUSR1: twice what the slowest save of the run took, and a minute.

    Training itself measures its saves and stops in time (``StopRequest.lead_seconds``); this is for clocks that disagree.
    """
    try:
        taken = [float(found[1]) for line in (run_dir / "log.txt").open() if (found := SAVED.search(line))]
    except OSError:
        taken = []
    limit = seconds(time)
    lead = round(2 * max(taken) + 60) if taken else LEAD
    return min(lead, limit // 4) if limit else lead


def render(config: Config, site: Site, counts: list[int]) -> str:
    """The job script."""
    run_dir = Path(config.run.dir)
    values = {
        "directives": "\n".join(f"#SBATCH {option}" for option in _directives(run_dir, site, counts)),
        "script": shlex.quote(str(script_path(run_dir))),
        "run": shlex.quote(str(run_dir)),
        "requeue": str(site.requeue).lower(),
        "preflight": str(site.preflight).lower(),
        "exclude": str(site.exclude_bad_nodes).lower(),
        "vain": str(site.vain_restarts),
        "pause": str(PAUSE),
        # no one else can have put something there: the name cannot be guessed, and a container has /tmp and little else
        "cache": f"{'/tmp' if site.container.kind else '${SLURM_TMPDIR:-${TMPDIR:-/tmp}}'}/scale-mae-{secrets.token_hex(8)}",
        "preflight_options": _preflight_options(config, site),
        "node_counts": " ".join(map(str, counts)),
        "setup": site.setup.rstrip(),
        "environment": _environment(site),
        "tasks": str(site.tasks_per_node),
        "srun": "".join(f" {shlex.quote(option)}" for option in [*_cores(site), *site.srun, *_pyxis(config, site)]),
        "task": config.run.task,
        "inside": shlex.join([*_apptainer(config, site), "python3" if site.container.kind else sys.executable]),
    }
    return re.sub(r"@(\w+)@", lambda found: values[found[1]], (CLUSTER / SCRIPT).read_text())


def _preflight_options(config: Config, site: Site) -> str:
    local = ["--local-dir", config.checkpoint.local_dir] if config.checkpoint.local_dir else []
    return "".join(f" {shlex.quote(option)}" for option in [*local, *site.preflight_options])


def _directives(run_dir: Path, site: Site, counts: list[int]) -> list[str]:
    quoted = shlex.quote
    options = [
        f"--job-name={quoted(run_dir.name)}",
        f"--nodes={min(counts)}-{max(counts)}" if len(counts) > 1 else f"--nodes={counts[0]}",
        f"--ntasks-per-node={site.tasks_per_node}",
        *(f"--{key.replace('_', '-')}={value}" for key in ("gpus_per_node", "cpus_per_task") if (value := getattr(site, key))),
        f"--time={site.time}",
        *(f"--{key}={quoted(value)}" for key in ("partition", "account", "qos") if (value := getattr(site, key))),
        f"--signal=USR1@{lead_seconds(run_dir, site.time)}",
        "--requeue" if site.requeue else "--no-requeue",
        "--open-mode=append",
        f"--output={quoted(str(run_dir / FOLDER / 'job-%j.log'))}",
        f"--chdir={quoted(str(Path.cwd()))}",
    ]
    return [*options, *site.sbatch]


def _environment(site: Site) -> str:
    lines = [f'export {key}="${{{key}:-{value}}}"' for key, value in ENVIRONMENT.items() if key not in site.env]
    if site.container.kind:  # what the host's Python has is not for the image's
        lines = ["unset PYTHONPATH", "export PYTHONNOUSERSITE=1", *lines]
    return "\n".join(lines + [f"export {key}={shlex.quote(str(value))}" for key, value in site.env.items()])


def _cores(site: Site) -> list[str]:
    # said again to srun, which since Slurm 22.05 does not take it from the job
    return [f"--cpus-per-task={site.cpus_per_task}"] if site.cpus_per_task else []


def _mounts(config: Config, site: Site) -> list[str]:
    local = [config.checkpoint.local_dir] if config.checkpoint.local_dir else []
    own = dict.fromkeys([config.run.dir, str(Path.cwd()), *local])
    return [mount if ":" in mount else f"{mount}:{mount}" for mount in [*own, *site.container.mounts]]


def _pyxis(config: Config, site: Site) -> list[str]:
    # said to srun, not to sbatch: as options of a whole job they would not reach every step
    if site.container.kind != "pyxis":
        return []
    mounts, image = ",".join(_mounts(config, site)), site.container.path
    return [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={Path.cwd()}"]


def _apptainer(config: Config, site: Site) -> list[str]:
    if site.container.kind != "apptainer":
        return []
    binds = [word for mount in _mounts(config, site) for word in ("--bind", mount)]
    gpus = ["--nv"] if site.gpus_per_node else []
    return ["apptainer", "exec", *gpus, *binds, "--pwd", str(Path.cwd()), site.container.path]


def set_aside(job: Job) -> Path:
    """Put code, config and script into the run directory; the script.

    Raises:
        SlurmError: it cannot be written.
    """
    folder = job.run_dir / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "code", ignore_errors=True)
        package, ignored = folder / "code" / "scale_mae", shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE_DIR, package, ignore=ignored)
        (folder / "code" / "run.py").write_text(RUN_PY)
        for extra in (SHIPPED_CONFIGS, CLUSTER):  # in an installed package they are inside already
            shutil.copytree(extra, package / extra.name, ignore=ignored, dirs_exist_ok=True)
        (folder / "config.yaml").write_text(_own_deepspeed(job.config, folder).to_yaml())
        script = script_path(job.run_dir)
        script.write_text(job.script)
        script.chmod(0o755)
        (folder / STOP).unlink(missing_ok=True)
    except OSError as error:
        raise SlurmError(f"run.dir={job.run_dir}: cannot be written ({error.strerror}); choose another run.dir") from None
    return script


def _own_deepspeed(config: Config, folder: Path) -> Config:
    """A DeepSpeed file of the user's is copied too."""
    given = Path(config.engine.deepspeed)
    if (SHIPPED_CONFIGS / f"{given}.json").is_file() or not given.is_file():
        return config
    own = folder / "deepspeed.json"
    if given.resolve() != own.resolve():
        shutil.copyfile(given, own)
    return config.model_copy(update={"engine": config.engine.model_copy(update={"deepspeed": str(own)})})


def submit(job: Job, chain: int = 1) -> list[int]:
    """Submit a job, or ``chain`` of them that wait for each other; their numbers.

    Raises:
        SlurmError: a job of this run is in the queue already, or Slurm refuses.
    """
    if chain < 1:
        raise SlurmError(f"--chain {chain}: not a number of jobs")
    if live := queued(job.run_dir):
        numbers = ", ".join(map(str, live))
        raise SlurmError(f"{job.run_dir}: job {numbers} of this run is in the queue; scale-mae cancel it first")
    script = set_aside(job)
    submitted: list[int] = []
    for place in range(1, chain + 1):
        after = [f"--dependency=afterany:{submitted[-1]}"] if submitted else []
        try:
            said = call("sbatch", "--parsable", *after, str(script), f"{place}/{chain}", env=clean_environment())
        except SlurmError as error:
            before = f"; {', '.join(map(str, submitted))} of the chain are in the queue" if submitted else ""
            raise SlurmError(f"{error}{before}") from None
        submitted.append(int(said.split(";")[0]))
    return submitted
