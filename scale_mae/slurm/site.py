"""What is the same for all jobs of a site, in one small YAML file (``cluster/site.example.yaml``)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator

from scale_mae.config import UserError
from scale_mae.config.field_types import Section

NAME = "site.yaml"
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")


class SiteError(UserError):
    """A site file, or an option of a job, that makes no sense."""


def seconds(time: str) -> int | None:
    """A time limit in any of Slurm's forms (``90``, ``90:00``, ``1:30:00``, ``1-6``, ``1-06:30:00``) in seconds; None: none.

    Raises:
        SiteError: none of them.
    """
    if time.upper() in ("INFINITE", "UNLIMITED"):
        return None
    found = _TIME.fullmatch(time)
    if not found:
        raise SiteError("not a time limit; write minutes, HH:MM:SS or D-HH:MM:SS")
    a, b, c = (int(found[key] or 0) for key in "abc")
    if found["days"]:
        return int(found["days"]) * 86400 + a * 3600 + b * 60 + c
    return a * 3600 + b * 60 + c if found["c"] else a * 60 + b


def _nodes(value: Any) -> Any:
    return str(value) if isinstance(value, int) else value


class ContainerConfig(Section):
    """The image that the processes run in."""

    image: str | None = None
    """A ``.sif`` file (Apptainer), a ``.sqsh`` file or ``registry#name:tag`` (pyxis). Empty: no container."""
    runtime: Literal["apptainer", "pyxis"] | None = None
    """Empty: by the image's name."""
    mounts: tuple[str, ...] = ()
    """``SRC`` or ``SRC:DST``, besides the run directory and the folder where the job was submitted."""

    @property
    def kind(self) -> str | None:
        """The runtime, or None without an image."""
        if not self.image:
            return None
        return self.runtime or ("apptainer" if self.image.endswith(".sif") else "pyxis")

    @property
    def path(self) -> str:
        """The image; a file by its whole path, without which pyxis would look for it in a registry.

        Raises:
            SiteError: a file that is not there.
        """
        assert self.image
        if not self.image.endswith((".sif", ".sqsh")):
            return self.image
        if not Path(self.image).is_file():
            raise SiteError(f"container image {self.image}: no such file")
        return str(Path(self.image).absolute())


class Site(Section):
    """Where jobs run and how they are started."""

    partition: str | None = None
    """Slurm partition."""
    account: str | None = None
    """Slurm account."""
    qos: str | None = None
    """Slurm quality of service."""
    time: str = "24:00:00"
    """Time limit of one job, in Slurm's forms."""
    nodes: Annotated[str, BeforeValidator(_nodes), Field(pattern=r"^[1-9]\d*(-[1-9]\d*)?$")] = "1"
    """How many, or ``MIN-MAX``: each start then takes as many as there are."""
    gpus_per_node: int | None = Field(None, gt=0)
    """GPUs, and processes, of a node. Empty: a node without GPUs, see ``cpus``."""
    cpus: int = Field(1, gt=0)
    """Processes of a node without GPUs."""
    cpus_per_task: int | None = Field(None, gt=0)
    """Cores of each process. Empty: Slurm decides."""
    requeue: bool = True
    """Whether a job may put itself back into the queue."""
    preflight: bool = True
    """Look over the nodes before each start."""
    preflight_options: tuple[str, ...] = ()
    """Further options of ``scale-mae preflight``."""
    exclude_bad_nodes: bool = False
    """Leave out what preflight finds unfit when the job starts again."""
    vain_restarts: int = Field(3, ge=0)
    """Restarts in a row without a new checkpoint after which a job gives up."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch."""
    srun: tuple[str, ...] = ("--cpu-bind=cores", "--distribution=block:block")
    """Further options of srun. By default each process is bound to cores of one socket, in the order of the GPUs."""
    container: ContainerConfig = ContainerConfig()
    """The image that the processes run in."""
    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], str | int | float] = Field(default_factory=dict)
    """Variables of every process."""
    setup: str = ""
    """Lines of shell at the start of a job."""

    @field_validator("time", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            raise ValueError('put it in quotes, as in "24:00:00": without, YAML reads a number')
        try:
            seconds(value)
        except SiteError as error:
            raise ValueError(str(error)) from None
        return value

    @property
    def tasks_per_node(self) -> int:
        """Processes of a node."""
        return self.gpus_per_node or self.cpus

    @property
    def node_range(self) -> tuple[int, int]:
        """Fewest and most nodes."""
        least, _, most = self.nodes.partition("-")
        return int(least), int(most or least)


def load_site(run_dir: Path, options: Mapping[str, Any]) -> Site:
    """The first ``site.yaml`` of the run directory, the present folder and ``~/.config/scale_mae``, under a command's options.

    Args:
        run_dir: the run directory.
        options: by key of :class:`Site`, ``image`` for the container's; None: not given.

    Raises:
        SiteError: a file that cannot be read, or unknown or unfit values.
    """
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "scale_mae"
    path = next((folder / NAME for folder in (run_dir, Path(), home) if (folder / NAME).is_file()), None)
    try:
        tree = (yaml.safe_load(path.read_text()) if path else None) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SiteError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise SiteError(f"{path}: a site file is a mapping of keys, not {type(tree).__name__}")
    given = {key: value for key, value in options.items() if value is not None}
    if image := given.pop("image", None):
        before = tree.get("container")
        tree["container"] = {**(before if isinstance(before, dict) else {}), "image": image}
    try:
        site = Site.model_validate({k: v for k, v in tree.items() if v is not None} | given)
        least, most = site.node_range
        if least > most:
            raise SiteError(f"nodes={site.nodes}: the first number must not be the larger one")
        return site
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        where = f"--{key.replace('_', '-')}" if key in given else f"{path}: {'.'.join(map(str, first['loc']))}"
        if first["type"] == "extra_forbidden":
            raise SiteError(f"{where}: unknown key; keys are {', '.join(Site.model_fields)}") from None
        raise SiteError(f"{where} {first['input']}: {first['msg'].removeprefix('Value error, ')}") from None
