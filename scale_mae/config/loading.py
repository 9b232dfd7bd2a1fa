"""The configuration of a run: one frozen tree, read from a recipe and ``section.key=value``, checked before anything starts.

Its sections are in :mod:`scale_mae.config.schema`. Anything wrong with it raises :class:`ConfigError`, one line that names the key,
the value and what to do.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from scale_mae.config.schema import (
    CheckpointConfig,
    ClassifyConfig,
    DataConfig,
    EngineConfig,
    HealConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    Section,
    TrainConfig,
    is_free,
)

PACKAGE = Path(__file__).parent
SHIPPED = PACKAGE / "ds_configs" if (PACKAGE / "ds_configs").is_dir() else PACKAGE.parent / "ds_configs"


class UserError(Exception):
    """Something the user can put right; its text is one line: what, where, what to do."""


class ConfigError(UserError):
    """A configuration that cannot run."""


class Config(Section):
    """Everything a run depends on. Together with a step number it determines what the run computes."""

    run: RunConfig = RunConfig()
    """Where the run lives and what makes it reproducible."""
    model: ModelConfig = ModelConfig()
    """The masked autoencoder, or the encoder of a classifier."""
    classify: ClassifyConfig = ClassifyConfig()
    """What makes a classifier of an encoder."""
    data: DataConfig = DataConfig()
    """Images and how they are cut."""
    optim: OptimConfig = OptimConfig()
    """The optimizer and its learning rate."""
    train: TrainConfig = TrainConfig()
    """Length, batch and arithmetic."""
    engine: EngineConfig = EngineConfig()
    """DeepSpeed and compilation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save and how much to keep."""
    log: LogConfig = LogConfig()
    """How often to look, and where it is told."""
    heal: HealConfig = HealConfig()
    """When a run goes back to its last good checkpoint."""

    @model_validator(mode="after")
    def _fits(self) -> Config:
        self._fits_task()
        stage, batch = self.engine.deepspeed, self.train.micro_batch
        if self.optim.name == "lars" and stage != "zero0":
            raise ValueError(f"optim.name=lars needs whole parameters, which engine.deepspeed={stage} cuts up; use zero0")
        if (self.classify.mixup or self.classify.cutmix) and batch % 2:
            raise ValueError(f"train.micro_batch={batch} is odd; classify.mixup and cutmix mix pairs of images")
        frozen = self.classify.train_blocks is not None and self.train.precision != "fp32"
        if frozen and self.train.recompute == "offload":  # fairscale would recompute what is not frozen in another precision
            raise ValueError("train.recompute=offload does not go with classify.train_blocks in 16 bits; use recompute=full")
        if self.engine.compile and self.train.recompute == "offload":
            raise ValueError("engine.compile=True does nothing for train.recompute=offload; use recompute=full or no compile")
        return self

    def _fits_task(self) -> None:
        """Nothing is set that the task does not look at."""
        task, c = self.run.task, self.classify
        if task == "pretrain":
            unused = {f"classify.{key}" for key in c.model_fields_set if getattr(c, key) != getattr(ClassifyConfig(), key)}
            unused |= {"optim.layer_decay"} if self.optim.layer_decay != 1 else set()
        else:
            own: tuple[str, ...] = ("mask_ratio", "target", "decoder_width", "decoder_depth", "decoder_heads")
            unused = {f"model.{key}" for key in own if getattr(self.model, key) != getattr(ModelConfig(), key)}
        if task == "linprobe":
            own = ("train_blocks", "drop_path", "smoothing", "mixup", "cutmix", "erasing")
            unused |= {f"classify.{key}" for key in own if getattr(c, key) != getattr(ClassifyConfig(), key)}
        elif len(c.sweep) > 1:
            unused |= {"classify.sweep"}
        if unused:
            raise ValueError(f"{sorted(unused)[0]} means nothing to run.task={task}; leave it out")

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of the warm-up: the linear scaling rule of Goyal et al. 2017."""
        return self.optim.base_lr * self.train.global_batch / 256

    def accumulation(self, world_size: int) -> int:
        """Micro-batches that one optimizer step adds up on each of ``world_size`` processes.

        Raises:
            ConfigError: the batch does not divide.
        """
        batch, micro = self.train.global_batch, self.train.micro_batch
        if batch % (total := micro * world_size):
            step = 2 if self.classify.mixup or self.classify.cutmix else 1
            fits = next((m for m in range(micro, 0, -step) if batch % (m * world_size) == 0), None)
            why = f"train.global_batch={batch} is not divisible by train.micro_batch={micro} x {world_size} processes = {total}"
            raise ConfigError(f"{why}; set train.micro_batch={fits}" if fits else f"{why}, nor by any other micro_batch")
        return batch // total

    def deepspeed_json(self) -> dict[str, Any]:
        """The DeepSpeed file that ``engine.deepspeed`` names, without the keys this Config owns.

        Raises:
            ConfigError: no such file, no JSON, or a key that belongs to this Config.
        """
        name = self.engine.deepspeed
        shipped = sorted(p.stem for p in SHIPPED.glob("*.json"))
        path = SHIPPED / f"{name}.json" if name in shipped else Path(name)
        try:
            content = json.loads(path.read_text())
        except OSError:
            raise ConfigError(f"engine.deepspeed={name}: no such file; shipped are {', '.join(shipped)}") from None
        except ValueError as error:
            raise ConfigError(f"engine.deepspeed={name}: not a JSON file ({error})") from None
        if not isinstance(content, dict):
            raise ConfigError(f"engine.deepspeed={name}: not a JSON object but {type(content).__name__}")
        owned = {
            "train_batch_size": "train.global_batch",
            "train_micro_batch_size_per_gpu": "train.micro_batch",
            "gradient_accumulation_steps": "train.global_batch",
            "gradient_clipping": "optim.clip_grad_norm",
            "bf16": "train.precision",
            "fp16": "train.precision",
            "optimizer": "optim.*",
            "scheduler": "optim.*",
            "activation_checkpointing": "train.recompute",
        }
        for key in owned.keys() & content.keys():
            raise ConfigError(f"engine.deepspeed={name} sets {key}, which {owned[key]} decides; remove it from the JSON")
        return dict(content)

    def steps(self, duration: str, dataset_size: int) -> int:
        """A duration in optimizer steps, rounded, at least 1 unless it is zero. An epoch is ``dataset_size`` images."""
        number, unit = duration.split()
        images = {"steps": self.train.global_batch, "epochs": dataset_size, "images": 1}[unit] * float(number)
        return max(round(images / self.train.global_batch), math.ceil(min(images, 1)))

    def to_yaml(self) -> str:
        """The whole tree as YAML, defaults included; :func:`load_config` reads it back to an equal Config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None)

    def digest(self) -> str:
        """Sixteen hexadecimal digits that change with any field."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()[:16]

    def differences(self, other: Config) -> list[str]:
        """Fields that change what the run computes and in which the two differ: ``section.key: this -> other``.

        Fields marked free (logging, checkpoint intervals, threads, compilation) and the run directory may differ.
        """
        found = []
        for section in type(self).model_fields:
            mine, theirs = getattr(self, section), getattr(other, section)
            for key, field in type(mine).model_fields.items():
                if getattr(mine, key) != getattr(theirs, key) and not is_free(field) and (section, key) != ("run", "dir"):
                    found.append(f"{section}.{key}: {getattr(mine, key)} -> {getattr(theirs, key)}")
        return found


def recipes() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(p.stem for p in (SHIPPED / "recipes").glob("*.yaml"))


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
    path = SHIPPED / "recipes" / f"{name}.yaml" if name in recipes() else Path(name)
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file; give a YAML file") from None
    except (PermissionError, IsADirectoryError) as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from None
    except OSError:
        hint = _did_you_mean(name, recipes())
        raise ConfigError(f"recipe {name!r} not found{hint}; shipped: {', '.join(recipes())}; or give a YAML file") from None
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
