"""The configuration of a run: one frozen tree, read from a recipe and ``section.key=value``, checked before anything starts.

Every field says its meaning and unit. Anything wrong with it raises :class:`ConfigError`, one line that names the key,
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
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

PACKAGE = Path(__file__).parent
SHIPPED = PACKAGE / "ds_configs" if (PACKAGE / "ds_configs").is_dir() else PACKAGE.parent / "ds_configs"


class UserError(Exception):
    """Something the user can put right; its text is one line: what, where, what to do."""


class ConfigError(UserError):
    """A configuration that cannot run."""


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


Side = Annotated[int, Field(gt=0)]
Pixels = Annotated[tuple[Side, Side], BeforeValidator(_pair, json_schema_input_type=int | tuple[int, int])]
DURATION = r"^\d+(\.\d+)?(e\d{1,2})? (steps|epochs|images)$"
NonNegative = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
MaybePath = Annotated[str | None, BeforeValidator(lambda text: text or None)]
Duration = Annotated[str, BeforeValidator(str, json_schema_input_type=str), Field(pattern=DURATION)]


class Section(BaseModel):
    """Base of all sections: immutable, and no key that is not declared."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunConfig(Section):
    """Where the run lives and what makes it reproducible."""

    dir: str = "runs/{recipe}"
    """Run directory; ``{recipe}`` is the recipe's name. The same command in the same directory resumes."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the initial weights, sample order, crops, flips and masks."""
    watchdog: float = Field(15.0, ge=0, json_schema_extra={"free": True})
    """Minutes without a step or a checkpoint after which every process writes the stacks of its threads and ends. Time before
    the first step does not count. 0: never."""


class ModelConfig(Section):
    """The masked autoencoder."""

    size: Literal["nano", "tiny", "small", "base", "large", "huge", "giant", "2b"] = "base"
    """Encoder: base/16, large/16, huge/14, giant/14, 2b/14; tiny and small with patch 16; nano is for demonstrations."""
    image_size: Pixels = (224, 224)
    """Image side, or [height, width], in pixels."""
    patch_size: Pixels | None = None
    """Patch side, or [height, width], in pixels; must divide the image. Empty: the size's own, 14 or 16."""
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of the patches hidden from the encoder."""
    target: Literal["norm_pixel", "pixel"] = "norm_pixel"
    """What is predicted: pixels normalised by each patch's own mean and deviation, or plain pixels."""
    decoder_width: int = Field(512, gt=0, multiple_of=4)
    """Width of the decoder."""
    decoder_depth: int = Field(8, gt=0)
    """Transformer blocks of the decoder."""
    decoder_heads: int = Field(16, gt=0)
    """Attention heads of the decoder; must divide its width."""
    init_from: MaybePath = None
    """Weights to begin with: a file or folder of ours, the reference, timm or Hugging Face. Empty: random, from run.seed."""

    @property
    def patch(self) -> tuple[int, int]:
        """Patch (height, width) in pixels, the size's own when none is given."""
        return self.patch_size or ((14, 14) if self.size in ("huge", "giant", "2b") else (16, 16))

    @model_validator(mode="after")
    def _divides(self) -> ModelConfig:
        if any(side % p for side, p in zip(self.image_size, self.patch, strict=True)):
            raise ValueError(
                f"model.image_size={list(self.image_size)} is not divisible by model.patch_size={list(self.patch)}"
            )
        if self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"model.decoder_width={self.decoder_width} is not divisible by model.decoder_heads={self.decoder_heads}"
            )
        rows, columns = (side // p for side, p in zip(self.image_size, self.patch, strict=True))
        if not 0 < int(rows * columns * (1 - self.mask_ratio)) < rows * columns:
            raise ValueError(
                f"model.mask_ratio={self.mask_ratio} keeps all or none of the {rows * columns} patches of "
                f"model.image_size={list(self.image_size)} at model.patch_size={list(self.patch)}"
            )
        return self


class DataConfig(Section):
    """Images and how they are cut."""

    source: str = "demo:train"
    """An index (scale-mae index), or what one is made of: class folders (root/class/image), a folder or {00..99} brace list
    of tar shards, a list, annotations, a named layout such as imagenet1k:train:/data/imagenet, or the shipped demo:train."""
    decoder: Literal["auto", "pillow", "dali_cpu", "dali_gpu"] = Field("auto", json_schema_extra={"free": True})
    """What decodes; all give the same images, within 8 of 255. auto: DALI on the GPU if there is one, else DALI on the CPU if
    it can be imported, else Pillow."""
    augmentation: Literal["none", "fixed_crop", "random_crop", "random_crop_jitter"] = "random_crop"
    """none: the centre, 7/8 of the short side; fixed_crop: the same size anywhere; random_crop: random size, shape and place;
    random_crop_jitter: that, and colour jitter."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Least and largest share of the image's area that a random crop takes."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and largest width-to-height ratio of a random crop."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    jitter: tuple[NonNegative, NonNegative, NonNegative] = (0.4, 0.4, 0.4)
    """Strength of brightness, contrast and saturation jitter, for augmentation=random_crop_jitter only."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means (red, green, blue) subtracted from images in [0, 1]."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel deviations (red, green, blue) that images are divided by."""
    threads: int | None = Field(None, gt=0, json_schema_extra={"free": True})
    """Decoding threads of each process. Empty: this machine's cores shared among its processes."""
    prefetch: int | None = Field(None, gt=0, json_schema_extra={"free": True})
    """Micro-batches decoded ahead of the step that needs them. Empty: enough to keep all threads busy, within an eighth of
    the memory."""
    max_failures: float = Field(0.001, ge=0, le=1, json_schema_extra={"free": True})
    """Share of the last 100,000 images that may be unreadable (each is replaced by another) before the run stops."""

    @model_validator(mode="after")
    def _ordered(self) -> DataConfig:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"data.crop_scale={[low, high]} must satisfy 0 < low <= high <= 1")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"data.crop_ratio={[low, high]} must satisfy 0 < low <= high")
        if min(self.std) <= 0:
            raise ValueError(f"data.std={list(self.std)} must be positive")
        return self


class OptimConfig(Section):
    """AdamW and its learning rate: linear warm-up from 0, then half a cosine."""

    base_lr: float = Field(1.5e-4, gt=0)
    """Peak learning rate per 256 images of global batch: peak = base_lr * train.global_batch / 256."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the schedule."""
    warmup: Duration = "40 epochs"
    """Length of the linear warm-up."""
    weight_decay: float = Field(0.05, ge=0)
    """Decay of all parameters but biases and one-dimensional ones."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    clip_grad_norm: float | None = Field(None, gt=0)
    """Largest global gradient norm; larger gradients are scaled down to it. Empty: no clipping."""


class TrainConfig(Section):
    """Length, batch and arithmetic."""

    duration: Duration = "800 epochs"
    """Length of the schedule."""
    global_batch: int = Field(4096, gt=0)
    """Images of one optimizer step, over all processes."""
    micro_batch: int = Field(64, gt=0, json_schema_extra={"free": True})
    """Images of one forward pass of one process; accumulation = global_batch / (micro_batch * processes)."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of forward and backward; weights and moments are kept in fp32, fp16 scales its loss dynamically."""
    recompute: Literal["none", "full", "every_k", "selective", "offload"] = Field("none", json_schema_extra={"free": True})
    """Activations recomputed in the backward pass: none, those of every block, of every k-th block, of all but the matrix
    products, or of every block with the block inputs kept in host memory."""
    recompute_every: int = Field(2, gt=0, json_schema_extra={"free": True})
    """k of recompute=every_k."""


class EngineConfig(Section):
    """DeepSpeed and compilation."""

    deepspeed: str = Field("zero2", json_schema_extra={"free": True})
    """A shipped DeepSpeed file (zero0, zero1, zero2, zero3, zero2_offload, zero3_offload) or a path to a JSON file."""
    compile: bool = Field(False, json_schema_extra={"free": True})
    """Compile the transformer blocks with torch.compile."""


class CheckpointConfig(Section):
    """When to save and how much to keep."""

    every: Duration = Field("20 epochs", json_schema_extra={"free": True})
    """Time between checkpoints; one is also written at the end and on SIGTERM or SIGINT."""
    keep: int = Field(3, gt=0, json_schema_extra={"free": True})
    """Newest checkpoints kept."""
    keep_every: Duration | None = Field(None, json_schema_extra={"free": True})
    """Kept for good besides: the first checkpoint of every such stretch of the schedule. Empty: none."""
    local_dir: MaybePath = Field(None, json_schema_extra={"free": True})
    """Folder on each node's own disk. A save then waits for that disk only; a thread copies it to the run directory.
    Empty: straight to the run directory."""


class LogConfig(Section):
    """How often to look."""

    every: int = Field(20, gt=0, json_schema_extra={"free": True})
    """Steps between log lines; the only moments at which the host waits for the accelerator."""


class Config(Section):
    """Everything a run depends on. Together with a step number it determines what the run computes."""

    run: RunConfig = RunConfig()
    """Where the run lives and what makes it reproducible."""
    model: ModelConfig = ModelConfig()
    """The masked autoencoder."""
    data: DataConfig = DataConfig()
    """Images and how they are cut."""
    optim: OptimConfig = OptimConfig()
    """AdamW and its learning rate."""
    train: TrainConfig = TrainConfig()
    """Length, batch and arithmetic."""
    engine: EngineConfig = EngineConfig()
    """DeepSpeed and compilation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save and how much to keep."""
    log: LogConfig = LogConfig()
    """How often to look."""

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.engine.compile and self.train.recompute == "offload":
            raise ValueError("engine.compile=True does nothing for train.recompute=offload; use recompute=full or no compile")
        return self

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of the warm-up: the linear scaling rule of Goyal et al. 2017."""
        return self.optim.base_lr * self.train.global_batch / 256

    def accumulation(self, world_size: int) -> int:
        """Micro-batches that one optimizer step adds up on each of ``world_size`` processes.

        Raises:
            ConfigError: the batch does not divide.
        """
        at_once = self.train.micro_batch * world_size
        if self.train.global_batch % at_once:
            raise ConfigError(
                f"train.global_batch={self.train.global_batch} is not divisible by train.micro_batch="
                f"{self.train.micro_batch} x {world_size} processes = {at_once}"
            )
        return self.train.global_batch // at_once

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
                free = isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("free")
                if getattr(mine, key) != getattr(theirs, key) and not free and (section, key) != ("run", "dir"):
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
