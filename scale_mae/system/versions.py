"""Versions of the packages that determine what a run computes."""

from __future__ import annotations

import platform
from importlib.metadata import version

from scale_mae import __version__


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the packages that a checkpoint depends on."""
    ours = {"python": platform.python_version(), "scale-mae": __version__}
    return ours | {p: version(p) for p in ("torch", "deepspeed", "timm")}
