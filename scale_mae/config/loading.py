"""Reads a configuration: a recipe file and ``section.key=value`` overrides."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from scale_mae.config.errors import ConfigError
from scale_mae.config.recipes import recipe_names, recipe_path
from scale_mae.config.schema import Config
from scale_mae.config.sections import Section


def load_config(recipe: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Config:
    """Read a recipe and apply overrides.

    Args:
        recipe: name of a shipped recipe, or path of a YAML file.
        overrides: ``section.key=value`` strings (values in YAML), or a mapping from ``section.key`` (or from ``section``
            to a mapping of keys) to values.

    Raises:
        ConfigError: unknown recipe or key, a file that cannot be read, wrong type, or values that do not fit together.
    """
    name = str(recipe)
    path = recipe_path(name)
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file; give a YAML file") from None
    except (PermissionError, IsADirectoryError) as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from None
    except OSError:
        hint = _did_you_mean(name, recipe_names())
        raise ConfigError(
            f"recipe {name!r} not found{hint}; shipped: {', '.join(recipe_names())}; or give a YAML file"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections, not {type(tree).__name__}")
    for key, value in _override_items(overrides):
        section, _, field = key.partition(".")
        tree[section] = tree.get(section) or {}  # an empty section reads as None
        if not isinstance(tree[section], dict):
            raise ConfigError(f"{path}: {section}: must be a mapping of keys")
        tree[section][field] = value
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None
    run_dir = config.run.dir.replace("{recipe}", path.stem)
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": run_dir})})


def saved_config(path: Path) -> Config | None:
    """What :meth:`Config.to_yaml` wrote; None where there is no file, or only what a power cut left of it.

    Raises:
        ConfigError: keys or values that this version does not know.
    """
    try:
        whole = isinstance(yaml.safe_load(path.read_text()), dict)
    except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return load_config(path) if whole else None


def _override_items(overrides: Iterable[str] | Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            if isinstance(value, Mapping):
                yield from ((f"{key}.{field}", v) for field, v in value.items())
            else:
                yield _checked_key(key), value
        return
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"override {item!r} is not section.key=value")
        try:
            value = text if _is_text(key) else yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"override {item!r}: the value is not valid YAML") from None
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?e[-+]?\d+", value):
            value = float(value)  # YAML 1.1 reads 1e-3 as text
        yield _checked_key(key), value


def _is_text(key: str) -> bool:
    """Whether a key holds text, a path for instance, in which YAML would take ``#`` and ``:`` for its own."""
    section, _, name = key.partition(".")
    annotation = Config.model_fields[section].annotation if section in Config.model_fields else None
    field = getattr(annotation, "model_fields", {}).get(name)
    return field is not None and field.annotation in (str, str | None)


def _checked_key(key: str) -> str:
    if key.count(".") != 1:
        raise ConfigError(f"key {key!r} is not section.key; sections: {', '.join(Config.model_fields)}")
    return key


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][:2])
    if first["type"] == "extra_forbidden":
        sections = Config.model_fields
        if len(first["loc"]) == 1:
            return f"unknown section {where!r}{_did_you_mean(where, list(sections))}; sections: {', '.join(sections)}"
        annotation = sections[str(first["loc"][0])].annotation
        keys = list(annotation.model_fields) if isinstance(annotation, type) and issubclass(annotation, Section) else []
        return f"unknown key {where!r}{_did_you_mean(str(first['loc'][1]), keys)}; keys: {', '.join(keys)}"
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "string_pattern_mismatch":
        return f"{where}={first['input']!r}: a duration is a number and a unit, e.g. '800 epochs', '1000 steps', '5e6 images'"
    return f"{where}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for completion and checks in editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
