"""The shipped recipes: their names, their files, and the headers of the files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from scale_mae.config.config_tree import SHIPPED_CONFIGS

RECIPES = SHIPPED_CONFIGS / "recipes"
HEADER_LINE = re.compile(r"^#   (command|hardware|time|result) +(\S.*)$", re.MULTILINE)


@dataclass(frozen=True)
class RecipeHeader:
    """The comments at the top of a shipped recipe."""

    summary: str
    """What the recipe trains, in one sentence."""
    command: str
    """A command that runs it."""
    hardware: str
    """Accelerators or cores that it is meant for."""
    time: str
    """How long it takes, as far as that is known."""
    result: str
    """The result to expect."""


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(recipe: str) -> Path:
    """Return the file of a shipped recipe, or ``recipe`` itself as a path if no shipped recipe has this name."""
    shipped = RECIPES / f"{recipe}.yaml"
    return shipped if recipe in recipe_names() else Path(recipe)


def read_header(name: str) -> RecipeHeader:
    """Read the header of a shipped recipe."""
    text = recipe_path(name).read_text()
    summary = text.partition("\n")[0].removeprefix("# ")
    return RecipeHeader(summary=summary, **dict(HEADER_LINE.findall(text)))
