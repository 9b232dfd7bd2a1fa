"""Submit a run to Slurm: check it, copy its code and config into the run directory, and queue its job script."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from scale_mae.checkpoint.paths import list_checkpoints
from scale_mae.config import PACKAGE_DIR, SHIPPED_CONFIGS, Config, ConfigError, saved_config
from scale_mae.data.errors import DataError, escape_unprintable
from scale_mae.data.source_check import check_source
from scale_mae.slurm import paths
from scale_mae.slurm.job_script import CLUSTER_DIR, render_job_script
from scale_mae.slurm.queue import SlurmError, get_queued_jobs, get_submission_environment, run_slurm_command
from scale_mae.slurm.site_config import SiteConfig

# Python searches the folder of a script first, so run.py imports the scale_mae that lies next to it.
# `python -m scale_mae` would search the current directory first, which may contain another scale_mae.
RUN_PY = """\
import runpy

runpy.run_module("scale_mae", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Job:
    """A run that is ready to be submitted.

    Attributes:
        config: The configuration of the run. Its run directory is an absolute path.
        script: The text of the job script.
    """

    config: Config
    script: str

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self.config.run.dir)


def prepare_job(config: Config, site: SiteConfig) -> Job:
    """Check a run for the nodes that it may get, and render its job script. This function writes no file.

    Raises:
        UserError: The global batch does not divide over the processes, the run directory contains a run with another
            configuration or has a name that Slurm does not accept, or the DeepSpeed file is invalid.
    """
    run_dir = Path(config.run.dir).absolute()
    if special := re.search(r"[%\\\n|]", str(run_dir)):
        raise SlurmError(f"run.dir={run_dir}: Slurm treats {special[0]!r} in file names specially. Choose another run.dir.")
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(run_dir)})})
    config.deepspeed_json()
    node_counts = get_valid_node_counts(config, site)
    earlier_config = saved_config(run_dir / "config.yaml")
    if earlier_config and (run_dir / "checkpoints").is_dir() and (differences := earlier_config.differences(config)):
        raise SlurmError(
            f"run.dir={run_dir}: this directory contains a run with another configuration ({differences[0]}). "
            "Choose another run.dir, or use the same values."
        )
    return Job(config, render_job_script(config, site, node_counts))


def get_valid_node_counts(config: Config, site: SiteConfig) -> list[int]:
    """Return the numbers of nodes, within the requested range, over which the global batch divides. The largest is first.

    Raises:
        ConfigError: The global batch divides over none of these numbers.
    """
    fewest, most = site.node_range
    valid = []
    error: ConfigError | None = None
    for nodes in range(most, fewest - 1, -1):
        try:
            config.accumulation(nodes * site.tasks_per_node)
            valid.append(nodes)
        except ConfigError as reason:
            error = error or reason
    if error and not valid:
        raise error
    return valid


def find_missing_paths(config: Config) -> list[str]:
    """Return a warning for each path in the configuration that this host does not see.

    This is no error, because the nodes may mount other file systems than this host.
    """
    problems = []
    for key, source in {"data.source": config.data.source, "classify.val_source": config.classify.val_source}.items():
        try:
            if source is not None:
                check_source(source)
        except DataError as error:
            problems.append(f"{key}: {error}")
        except OSError as error:
            problems.append(f"{key}: {error.filename}: cannot be read ({error.strerror})")
    weights = config.model.init_from
    resumes = bool(list_checkpoints(Path(config.run.dir)))  # the run then reads its checkpoint and not these weights
    if weights and not resumes and not os.path.exists(weights):
        problems.append(f"model.init_from={weights}: no such file or folder")
    advice = "The nodes may see it although this host does not. If they do not, run scale-mae cancel and correct the path."
    return [escape_unprintable(f"{problem.rstrip('.')}. {advice}") for problem in problems]


def submit_job(job: Job, chain: int = 1) -> list[int]:
    """Write the files of a job and submit it. Return the numbers of the submitted jobs.

    Args:
        job: The job.
        chain: Number of jobs to submit. Each job waits for the end of the previous one.

    Raises:
        SlurmError: A job of this run is already in the queue, or Slurm rejects the job.
    """
    if chain < 1:
        raise SlurmError(f"--chain={chain}: must be at least 1")
    if queued := get_queued_jobs(job.run_dir):
        jobs = f"job {next(iter(queued))} is" if len(queued) == 1 else f"jobs {', '.join(map(str, queued))} are"
        raise SlurmError(f"run.dir={job.run_dir}: {jobs} already in the queue. First run scale-mae cancel {job.run_dir}")
    script = write_job_files(job)
    submitted: list[int] = []
    for position in range(1, chain + 1):
        dependency = [f"--dependency=afterany:{submitted[-1]}"] if submitted else []
        command = ["sbatch", "--parsable", *dependency, str(script), f"{position}/{chain}"]
        try:
            answer = run_slurm_command(*command, env=get_submission_environment())
        except SlurmError as error:
            if not submitted:
                raise
            queued_jobs = ", ".join(map(str, submitted))
            raise SlurmError(
                f"{error}. The chain is incomplete; in the queue: {queued_jobs}. To remove: scale-mae cancel {job.run_dir}"
            ) from None
        submitted.append(int(answer.split(";")[0]))  # NUMBER or NUMBER;CLUSTER
    return submitted


def write_job_files(job: Job) -> Path:
    """Write code, config and job script into the run directory. Return the path of the script.

    The job uses these copies, so that later changes to the code or the recipe do not affect it.

    Raises:
        SlurmError: The run directory cannot be written.
    """
    code_dir, script = paths.code_dir(job.run_dir), paths.job_script_path(job.run_dir)
    package, ignored = code_dir / "scale_mae", shutil.ignore_patterns("__pycache__")
    try:
        paths.slurm_dir(job.run_dir).mkdir(parents=True, exist_ok=True)
        shutil.rmtree(code_dir, ignore_errors=True)
        shutil.copytree(PACKAGE_DIR, package, ignore=ignored)
        (code_dir / "run.py").write_text(RUN_PY)
        for folder in (SHIPPED_CONFIGS, CLUSTER_DIR):  # an installed package already contains them
            shutil.copytree(folder, package / folder.name, ignore=ignored, dirs_exist_ok=True)
        paths.job_config_path(job.run_dir).write_text(_copy_deepspeed_file(job).to_yaml())
        script.write_text(job.script)
        script.chmod(0o755)
        paths.cancelled_jobs_path(job.run_dir).unlink(missing_ok=True)
    except OSError as error:
        raise SlurmError(f"run.dir={job.run_dir}: cannot be written ({error.strerror}). Choose another run.dir.") from None
    return script


def _copy_deepspeed_file(job: Job) -> Config:
    """Copy a DeepSpeed file of the user into the run directory. Return the configuration that refers to the copy."""
    config, given = job.config, Path(job.config.engine.deepspeed)
    if (SHIPPED_CONFIGS / f"{given}.json").is_file() or not given.is_file():
        return config
    copy = paths.slurm_dir(job.run_dir) / "deepspeed.json"
    if given.resolve() != copy.resolve():
        shutil.copyfile(given, copy)
    return config.model_copy(update={"engine": config.engine.model_copy(update={"deepspeed": str(copy)})})
