"""Shell completion of recipes, config keys and their values. argcomplete completes commands, options and files itself."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from scale_mae.config import SHIPPED_CONFIGS, config_keys, recipe_names


def complete_recipe(prefix: str, **_: Any) -> list[str]:
    """Return the names of the shipped recipes, and the YAML files and folders that start with ``prefix``."""
    from argcomplete.completers import FilesCompleter

    return [*recipe_names(), *FilesCompleter(["yaml", "yml"])(prefix)]


def complete_override(prefix: str, **_: Any) -> list[str]:
    """Return ``section.key=`` for every key, or ``section.key=value`` for the values that a key can have."""
    keys = config_keys()
    key, equals, _typed = prefix.partition("=")
    if not equals:
        return [f"{key}=" for key in keys]
    if key == "engine.deepspeed":
        values = sorted(path.stem for path in SHIPPED_CONFIGS.glob("*.json"))
    else:
        values = list(_values(keys[key].annotation)) if key in keys else []
    return [f"{key}={value}" for value in values]


def _values(annotation: Any) -> Iterator[str]:
    """Yield the values of a type that has few of them."""
    if annotation is bool:
        yield from ("true", "false")
    elif annotation in (None, NoneType):
        yield "null"
    elif get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    elif get_origin(annotation) is not tuple:
        for part in get_args(annotation):
            yield from _values(part)


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the request of a shell and exit the process, if this process was started to answer one."""
    import argcomplete

    argcomplete.autocomplete(parser)


def completion_script(shell: str) -> str:
    """Return the script that enables completion of ``scale-mae`` in ``bash`` or ``zsh``."""
    from argcomplete.shell_integration import shellcode

    return shellcode(["scale-mae"], shell=shell)
