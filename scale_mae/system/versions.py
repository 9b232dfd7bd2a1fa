"""Versions of the packages that determine what a run computes."""

from __future__ import annotations

import platform
from importlib.metadata import version

from scale_mae import __version__


def package_versions() -> dict[str, str]:
    """Return the versions of Python, scale_mae, and the packages that a checkpoint depends on."""
    own = {"python": platform.python_version(), "scale-mae": __version__}
    return own | {package: version(package) for package in ("torch", "deepspeed", "timm")}
