"""A run becomes a Slurm job: checked, code and config set aside, one script written, submitted."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from scale_mae.config import PACKAGE, SHIPPED, Config, ConfigError, UserError, saved_config
from scale_mae.slurm.site import Site, seconds

CLUSTER = PACKAGE / "cluster" if (PACKAGE / "cluster").is_dir() else PACKAGE.parent / "cluster"
FOLDER = "slurm"  # of a run directory
JOBS, STOP, SCRIPT = "jobs", "stop", "job.sh"
LEAD = 120  # seconds before the time limit at which Slurm warns a run whose saves have not been measured
SAVED = re.compile(r" saved .* in ([\d.]+) s")
# Variables that a job has unless its environment or the site says otherwise.
ENVIRONMENT = {
    "NCCL_DEBUG": "WARN",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # a collective that fails or times out ends its process
    "PYTHONFAULTHANDLER": "1",
    "PYTHONUNBUFFERED": "1",
}


class SubmitError(UserError):
    """A job that cannot be submitted."""


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
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(run_dir)})})
    config.deepspeed_json()
    counts = node_counts(config, site)
    before = saved_config(run_dir / "config.yaml")
    if before and (run_dir / "checkpoints").is_dir() and (differences := before.differences(config)):
        raise SubmitError(
            f"{run_dir} holds a run of another config ({differences[0]}); choose another run.dir or the same values"
        )
    return Job(config, site, render(config, site, counts))


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

    Training itself measures its saves and stops in time (``StopRequest.lead``); this is for clocks that disagree.
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
        "directives": "\n".join(f"#SBATCH {option}" for option in _directives(run_dir, site)),
        "script": shlex.quote(str(script_path(run_dir))),
        "run": shlex.quote(str(run_dir)),
        "requeue": str(site.requeue).lower(),
        "preflight": str(site.preflight).lower(),
        "exclude": str(site.exclude_bad_nodes).lower(),
        "vain": str(site.vain_restarts),
        "preflight_options": _preflight_options(config, site),
        "node_counts": " ".join(map(str, counts)),
        "setup": site.setup.rstrip(),
        "environment": _environment(site),
        "tasks": str(site.tasks_per_node),
        "srun": "".join(f" {shlex.quote(option)}" for option in [*site.srun, *_pyxis(run_dir, site)]),
        "inside": shlex.join([*_apptainer(run_dir, site), *_python(site), "-m", "scale_mae"]),
    }
    return re.sub(r"@(\w+)@", lambda found: values[found[1]], (CLUSTER / SCRIPT).read_text())


def _preflight_options(config: Config, site: Site) -> str:
    local = ["--local-dir", config.checkpoint.local_dir] if config.checkpoint.local_dir else []
    return "".join(f" {shlex.quote(option)}" for option in [*local, *site.preflight_options])


def _directives(run_dir: Path, site: Site) -> list[str]:
    quoted = shlex.quote
    options = [
        f"--job-name={quoted(run_dir.name)}",
        f"--nodes={site.nodes}",
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
    return "\n".join(lines + [f"export {key}={shlex.quote(str(value))}" for key, value in site.env.items()])


def _mounts(run_dir: Path, site: Site) -> list[str]:
    own = dict.fromkeys([str(run_dir), str(Path.cwd())])
    return [mount if ":" in mount else f"{mount}:{mount}" for mount in [*own, *site.container.mounts]]


def _pyxis(run_dir: Path, site: Site) -> list[str]:
    # said to srun, not to sbatch: as options of a whole job they would not reach every step
    if site.container.kind != "pyxis":
        return []
    mounts = ",".join(_mounts(run_dir, site))
    return [f"--container-image={site.container.image}", f"--container-mounts={mounts}", f"--container-workdir={Path.cwd()}"]


def _apptainer(run_dir: Path, site: Site) -> list[str]:
    if site.container.kind != "apptainer":
        return []
    binds = [word for mount in _mounts(run_dir, site) for word in ("--bind", mount)]
    gpus = ["--nv"] if site.gpus_per_node else []
    return ["apptainer", "exec", *gpus, *binds, "--pwd", str(Path.cwd()), str(site.container.image)]


def _python(site: Site) -> list[str]:
    return ["python3"] if site.container.kind else [sys.executable]


def set_aside(job: Job) -> Path:
    """Put code, config and script into the run directory; the script.

    Raises:
        SubmitError: it cannot be written.
    """
    folder = job.run_dir / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "code", ignore_errors=True)
        package, ignored = folder / "code" / "scale_mae", shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, package, ignore=ignored)
        for extra in (SHIPPED, CLUSTER):  # in an installed package they are inside already
            shutil.copytree(extra, package / extra.name, ignore=ignored, dirs_exist_ok=True)
        (folder / "config.yaml").write_text(_own_deepspeed(job.config, folder).to_yaml())
        script = script_path(job.run_dir)
        script.write_text(job.script)
        script.chmod(0o755)
        (folder / STOP).unlink(missing_ok=True)
    except OSError as error:
        raise SubmitError(f"run.dir={job.run_dir}: cannot be written ({error.strerror}); choose another run.dir") from None
    return script


def _own_deepspeed(config: Config, folder: Path) -> Config:
    """A DeepSpeed file of the user's is copied too."""
    given = Path(config.engine.deepspeed)
    if (SHIPPED / f"{given}.json").is_file() or not given.is_file():
        return config
    own = folder / "deepspeed.json"
    if given.resolve() != own.resolve():
        shutil.copyfile(given, own)
    return config.model_copy(update={"engine": config.engine.model_copy(update={"deepspeed": str(own)})})


def submit(job: Job, chain: int = 1) -> list[int]:
    """Submit a job, or ``chain`` of them that wait for each other; their numbers.

    Raises:
        SubmitError: a job of this run is in the queue already, or Slurm refuses.
    """
    if chain < 1:
        raise SubmitError(f"--chain {chain}: not a number of jobs")
    if live := queued(job.run_dir):
        numbers = ", ".join(map(str, live))
        raise SubmitError(f"{job.run_dir}: job {numbers} of this run is in the queue; scale-mae cancel it first")
    script = set_aside(job)
    submitted: list[int] = []
    for place in range(1, chain + 1):
        after = [f"--dependency=afterany:{submitted[-1]}"] if submitted else []
        said = call("sbatch", "--parsable", *after, str(script), f"{place}/{chain}")
        submitted.append(int(said.split(";")[0]))
        (job.run_dir / FOLDER / JOBS).write_text("".join(f"{number}\n" for number in submitted))
    return submitted


def jobs(run_dir: Path) -> list[int]:
    """Numbers of the jobs that the run was last submitted as."""
    try:
        return [int(line) for line in (run_dir / FOLDER / JOBS).read_text().split()]
    except OSError:
        return []


def queued(run_dir: Path) -> dict[int, tuple[str, str]]:
    """Those of them that Slurm still knows: their states and why they wait.

    Raises:
        SubmitError: there is no Slurm here, or it does not answer.
    """
    numbers = jobs(run_dir)
    if not numbers:
        return {}
    # without --jobs: for one that is long gone squeue would fail
    lines = call("squeue", "--noheader", "--me", "--format=%i|%T|%r").splitlines()
    found = (line.split("|", 2) for line in lines)
    live = {int(i): (state, reason) for i, state, reason in found if i.isdigit()}
    return {number: live[number] for number in numbers if number in live}


def call(*command: str) -> str:
    """What one of Slurm's commands prints.

    Raises:
        SubmitError: it is not there, or fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise SubmitError(f"{command[0]} is not on the PATH: no Slurm here? (pretrain runs without one)") from None
    except subprocess.TimeoutExpired:
        raise SubmitError(f"{command[0]} gave no answer in 60 s; is the Slurm controller up?") from None
    if done.returncode:
        raise SubmitError(f"{command[0]}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout
