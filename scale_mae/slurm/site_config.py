"""The site file ``site.yaml``: settings that all jobs of a cluster share. See ``cluster/site.example.yaml``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator

from scale_mae.config import UserError
from scale_mae.config.field_types import Section

FILE_NAME = "site.yaml"
_TIME_LIMIT = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")


class SiteConfigError(UserError):
    """A site file cannot be read, or it or an option of ``scale-mae submit`` has an invalid value."""


def parse_time_limit(text: str) -> int | None:
    """Return a time limit in seconds. ``None`` means that there is no limit.

    Args:
        text: A time limit in one of Slurm's forms: ``90``, ``90:00``, ``1:30:00``, ``1-6``, ``1-06:30:00`` or ``UNLIMITED``.

    Raises:
        SiteConfigError: The text has none of these forms.
    """
    if text.upper() in ("INFINITE", "UNLIMITED"):
        return None
    match = _TIME_LIMIT.fullmatch(text)
    if not match:
        raise SiteConfigError("not a time limit. Write minutes, HH:MM:SS or D-HH:MM:SS.")
    first, second, third = (int(match[key] or 0) for key in ("first", "second", "third"))
    if match["days"]:  # days-hours:minutes:seconds
        return int(match["days"]) * 86400 + first * 3600 + second * 60 + third
    if match["third"]:  # hours:minutes:seconds
        return first * 3600 + second * 60 + third
    return first * 60 + second  # minutes:seconds


def _number_to_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) else value


def _check_nodes(nodes: str) -> str:
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)?", nodes):
        raise ValueError("not a number of nodes. Write a number such as 4, or a range such as 2-8.")
    fewest, _, most = nodes.partition("-")
    if int(fewest) > int(most or fewest):
        raise ValueError("the first number of the range is larger than the second. Write the smaller number first.")
    return nodes


def _check_variable_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError("not a name of an environment variable. Use letters, digits and underscores only.")
    return name


class ContainerConfig(Section):
    """The container image in which the processes run."""

    image: str | None = None
    """A ``.sif`` file (Apptainer), or a ``.sqsh`` file or ``registry#name:tag`` (pyxis). By default there is no container."""
    runtime: Literal["apptainer", "pyxis"] | None = None
    """Container runtime. By default Apptainer runs ``.sif`` files and pyxis runs all other images."""
    mounts: tuple[str, ...] = ()
    """Folders of the host that the container sees, as ``SRC`` or ``SRC:DST``. The run directory, ``checkpoint.local_dir`` and
    the folder in which the job was submitted are always mounted."""

    @property
    def chosen_runtime(self) -> Literal["apptainer", "pyxis"] | None:
        """The runtime of the image. ``None`` means that there is no image."""
        if not self.image:
            return None
        return self.runtime or ("apptainer" if self.image.endswith(".sif") else "pyxis")

    @property
    def resolved_image(self) -> str:
        """The image. A file is an absolute path, because pyxis searches a registry for any other name.

        Raises:
            SiteConfigError: The image file does not exist.
        """
        assert self.image
        if not self.image.endswith((".sif", ".sqsh")):
            return self.image
        if not Path(self.image).is_file():
            raise SiteConfigError(
                f"container.image={self.image}: no such file. Set container.image or --container to an image."
            )
        return str(Path(self.image).absolute())


class SiteConfig(Section):
    """Where and how jobs run."""

    partition: str | None = None
    """Slurm partition. By default Slurm chooses it."""
    account: str | None = None
    """Slurm account. By default Slurm chooses it."""
    qos: str | None = None
    """Slurm quality of service. By default Slurm chooses it."""
    time: str = "24:00:00"
    """Time limit of one job, in one of Slurm's forms: minutes, ``HH:MM:SS`` or ``D-HH:MM:SS``."""
    nodes: Annotated[str, BeforeValidator(_number_to_text), AfterValidator(_check_nodes)] = "1"
    """Number of nodes, or a range ``MIN-MAX``. With a range, each start of the job uses as many nodes as Slurm offers."""
    gpus_per_node: int | None = Field(None, gt=0)
    """GPUs per node. One process runs on each GPU. Leave it empty for nodes without GPUs and set ``cpus``."""
    cpus: int = Field(1, gt=0)
    """Processes per node if ``gpus_per_node`` is empty."""
    cpus_per_task: int | None = Field(None, gt=0)
    """CPU cores per process. By default Slurm decides."""
    requeue: bool = True
    """Whether a job that ends before the run is finished requeues itself."""
    preflight: bool = True
    """Whether to check all nodes with ``scale-mae preflight`` before each start of training."""
    preflight_options: tuple[str, ...] = ()
    """Additional options of ``scale-mae preflight``."""
    exclude_bad_nodes: bool = False
    """Whether the next start excludes the nodes that preflight reports as bad."""
    max_restarts_without_progress: int = Field(3, ge=0)
    """The job gives up after this many restarts in a row without a new checkpoint."""
    sbatch: tuple[str, ...] = ()
    """Additional options of ``sbatch``."""
    srun: tuple[str, ...] = ("--cpu-bind=cores", "--distribution=block:block")
    """Options of ``srun``. The default binds each process to cores of one socket, in the order of the GPUs."""
    container: ContainerConfig = ContainerConfig()
    """The container image in which the processes run."""
    env: dict[Annotated[str, AfterValidator(_check_variable_name)], str | int | float] = Field(default_factory=dict)
    """Environment variables of all processes."""
    setup: str = ""
    """Shell commands that run at the start of a job, for instance ``module load``."""

    @field_validator("time", mode="before")
    @classmethod
    def _check_time(cls, value: Any) -> Any:
        if not isinstance(value, str):
            raise ValueError('not in quotes, so YAML reads a number. Write it in quotes, as in "24:00:00".')
        try:
            parse_time_limit(value)
        except SiteConfigError as error:
            raise ValueError(str(error)) from None
        return value

    @property
    def tasks_per_node(self) -> int:
        """The number of processes per node."""
        return self.gpus_per_node or self.cpus

    @property
    def node_range(self) -> tuple[int, int]:
        """The fewest and the most nodes."""
        fewest, _, most = self.nodes.partition("-")
        return int(fewest), int(most or fewest)


def load_site_config(run_dir: Path, options: Mapping[str, Any]) -> SiteConfig:
    """Return the settings of a site file, replaced by options of ``scale-mae submit`` where given.

    The site file is the first ``site.yaml`` in the run directory, the current directory or ``~/.config/scale_mae``.
    Without one, all settings have their defaults.

    Args:
        run_dir: Run directory.
        options: Values by key of :class:`SiteConfig`; ``image`` stands for ``container.image``. ``None`` means not given.

    Raises:
        SiteConfigError: The file cannot be read, or a key is unknown, or a value is invalid.
    """
    user_dir = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "scale_mae"
    path = next((folder / FILE_NAME for folder in (run_dir, Path(), user_dir) if (folder / FILE_NAME).is_file()), None)
    settings = _read_yaml(path) if path else {}
    given = {key: value for key, value in options.items() if value is not None}
    if image := given.pop("image", None):
        container = settings.get("container")
        settings["container"] = {**(container if isinstance(container, dict) else {}), "image": image}
    try:
        return SiteConfig.model_validate({key: value for key, value in settings.items() if value is not None} | given)
    except ValidationError as error:
        raise _describe(error, path, given) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SiteConfigError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(settings, dict):
        raise SiteConfigError(f"{path}: the file must contain keys with values, not a {type(settings).__name__}")
    return settings


def _describe(error: ValidationError, path: Path | None, given: Mapping[str, Any]) -> SiteConfigError:
    """Return the first error of pydantic as one line that names the option, or the file and the key."""
    first = error.errors()[0]
    keys = [str(key) for key in first["loc"] if key != "[key]"]
    where = f"--{keys[0].replace('_', '-')}" if keys[0] in given else f"{path}: {'.'.join(keys)}"
    if first["type"] == "extra_forbidden":
        section = ContainerConfig if len(keys) > 1 else SiteConfig
        return SiteConfigError(f"{where}: unknown key. The known keys are {', '.join(section.model_fields)}.")
    return SiteConfigError(f"{where}={first['input']}: {first['msg'].removeprefix('Value error, ')}")
