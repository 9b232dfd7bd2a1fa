"""Reads a configuration from a recipe file and ``section.key=value`` overrides."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from scale_mae.config.config_tree import Config
from scale_mae.config.errors import ConfigError
from scale_mae.config.recipes import recipe_names, recipe_path


def load_config(recipe: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Config:
    """Read a recipe and apply overrides.

    Args:
        recipe: Name of a shipped recipe, or path of a YAML file.
        overrides: Strings ``section.key=value`` with values in YAML; or a mapping from ``section.key`` to a value, or from
            ``section`` to a mapping of keys to values.

    Raises:
        ConfigError: The recipe is unknown or unreadable, a key is unknown, a value has the wrong type, or values contradict
            each other.
    """
    path = recipe_path(str(recipe))
    tree = _read_yaml(path)
    for key, value in _parse_overrides(overrides):
        section, _, name = key.partition(".")
        tree[section] = tree.get(section) or {}  # YAML reads an empty section as None
        if not isinstance(tree[section], dict):
            raise ConfigError(f"{path}: {section} is not a mapping of keys to values. Write '{section}: {{key: value}}'.")
        tree[section][name] = value
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_describe(error)) from None
    run_dir = config.run.dir.replace("{recipe}", path.stem)
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": run_dir})})


def saved_config(path: Path) -> Config | None:
    """Read a file that :meth:`Config.to_yaml` wrote. Return None if it does not exist or is incomplete after a power failure.

    Raises:
        ConfigError: The file has keys or values that this version does not know.
    """
    try:
        complete = isinstance(yaml.safe_load(path.read_text()), dict)
    except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return load_config(path) if complete else None


def config_keys() -> dict[str, FieldInfo]:
    """Return the declaration of every key, by its full name ``section.key``."""
    found: dict[str, FieldInfo] = {}
    for section, info in Config.model_fields.items():
        fields: dict[str, FieldInfo] = getattr(info.annotation, "model_fields", {})
        found |= {f"{section}.{name}": field for name, field in fields.items()}
    return found


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, with which editors complete and check recipes."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file. Give the path of a YAML file.") from None
    except (PermissionError, IsADirectoryError) as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Give the path of a readable YAML file.") from None
    except OSError:
        hint = _did_you_mean(str(path), recipe_names())
        raise ConfigError(
            f"{path}: no such recipe or file{hint}. Give the path of a YAML file or one of {', '.join(recipe_names())}."
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())}). Correct the file.") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: contains a {type(tree).__name__}, not a mapping of sections. Write 'section: {{key: value}}'."
        )
    return tree


def _parse_overrides(overrides: Iterable[str] | Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield ``section.key`` and value of each override."""
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            if isinstance(value, Mapping):
                yield from ((f"{key}.{name}", v) for name, v in value.items())
            else:
                yield _check_form(key), value
        return
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override}: not an override. Write section.key=value, such as train.micro_batch=32.")
        yield _check_form(key), _parse_value(key, text)


def _parse_value(key: str, text: str) -> Any:
    """Parse the value of an override as YAML, except text such as paths, in which YAML would interpret ``#`` and ``:``."""
    field = config_keys().get(key)
    if field is not None and field.annotation in (str, str | None):
        return None if text == "null" and field.annotation == str | None else text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{key}={text}: the value is not valid YAML. Quote it or correct it.") from None
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?e[-+]?\d+", value):
        return float(value)  # YAML 1.1 reads 1e-3 as text
    return value


def _check_form(key: str) -> str:
    if key.count(".") != 1:
        raise ConfigError(f"{key}: not of the form section.key. The sections are {', '.join(Config.model_fields)}.")
    return key


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _describe(error: ValidationError) -> str:
    """Describe the first problem in one line."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"][:2]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        sections = list(Config.model_fields)
        return f"{key}: unknown section{_did_you_mean(key, sections)}. The sections are {', '.join(sections)}."
    if first["type"] == "extra_forbidden":
        section = location[0]
        names = [name.removeprefix(f"{section}.") for name in config_keys() if name.startswith(f"{section}.")]
        return f"{key}: unknown key{_did_you_mean(location[1], names)}. The keys of {section} are {', '.join(names)}."
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "string_pattern_mismatch":
        return f"{key}={first['input']!r}: not a duration. Set a number and a unit: '800 epochs', '1000 steps' or '5e6 images'."
    return f"{key}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}."
