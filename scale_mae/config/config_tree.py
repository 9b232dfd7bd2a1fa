"""The configuration tree of a run, and the checks across its sections."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import model_validator

from scale_mae.config.errors import ConfigError
from scale_mae.config.field_types import Section, may_change_on_resume
from scale_mae.config.schema import (
    CheckpointConfig,
    ClassifyConfig,
    DataConfig,
    EngineConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RollbackConfig,
    RunConfig,
    TrainConfig,
)

PACKAGE_DIR = Path(__file__).parents[1]
# The folder is inside an installed package, and next to the package in a clone of the repository.
SHIPPED_CONFIGS = PACKAGE_DIR / "ds_configs" if (PACKAGE_DIR / "ds_configs").is_dir() else PACKAGE_DIR.parent / "ds_configs"

OWNED_BY = {  # key of a DeepSpeed file -> the config key that decides it
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch",
    "gradient_clipping": "optim.clip_grad_norm",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "optimizer": "optim.name",
    "scheduler": "optim.warmup",
    "activation_checkpointing": "train.activation_checkpointing",
}


class Config(Section):
    """Everything a run depends on. Together with a step number it determines what the run computes."""

    run: RunConfig = RunConfig()
    """Where the run is stored, what it trains, and its seed."""
    model: ModelConfig = ModelConfig()
    """The masked autoencoder, or the encoder of a classifier."""
    classify: ClassifyConfig = ClassifyConfig()
    """The classifier on top of the encoder, for `run.task=finetune` and `run.task=linprobe`."""
    data: DataConfig = DataConfig()
    """The images, and how they are decoded, cropped and augmented."""
    optim: OptimConfig = OptimConfig()
    """The optimizer and its learning rate."""
    train: TrainConfig = TrainConfig()
    """Length of the run, batch size, precision and activation checkpointing."""
    engine: EngineConfig = EngineConfig()
    """DeepSpeed and compilation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save checkpoints and which of them to keep."""
    log: LogConfig = LogConfig()
    """How often metrics are logged, and where they go."""
    rollback: RollbackConfig = RollbackConfig()
    """When a run rolls back to its last good checkpoint."""

    @model_validator(mode="after")
    def _check_across_sections(self) -> Config:
        self._check_task()
        stage, micro_batch = self.engine.deepspeed, self.train.micro_batch
        if self.optim.name == "lars" and stage != "zero0":
            raise ValueError(
                f"optim.name=lars does not work with engine.deepspeed={stage}, because LARS needs the norms of "
                "whole parameters. Set engine.deepspeed=zero0."
            )
        if (self.classify.mixup or self.classify.cutmix) and micro_batch % 2:
            raise ValueError(
                f"train.micro_batch={micro_batch} is odd, but classify.mixup and classify.cutmix mix pairs of images. "
                "Set an even train.micro_batch."
            )
        if self.train.activation_checkpointing == "offload":
            self._check_offload()
        return self

    def _check_offload(self) -> None:
        # fairscale would recompute the trainable parts in another precision than the frozen ones
        if self.classify.trainable_blocks is not None and self.train.precision != "fp32":
            raise ValueError(
                f"train.activation_checkpointing=offload does not work with classify.trainable_blocks and "
                f"train.precision={self.train.precision}. Set train.activation_checkpointing=full."
            )
        if self.engine.compile:
            raise ValueError(
                "engine.compile=true has no effect with train.activation_checkpointing=offload. "
                "Set engine.compile=false or train.activation_checkpointing=full."
            )

    def _check_task(self) -> None:
        """Refuse keys that the task does not use."""
        keys: tuple[str, ...]
        task, classify = self.run.task, self.classify
        if task == "pretrain":
            unused = {f"classify.{key}" for key in _changed_keys(classify, classify.model_fields_set)}
            unused |= {"optim.layer_decay"} if self.optim.layer_decay != 1 else set()
        else:
            keys = ("mask_ratio", "target", "decoder_width", "decoder_depth", "decoder_heads")
            unused = {f"model.{key}" for key in _changed_keys(self.model, keys)}
        if task == "linprobe":
            keys = ("trainable_blocks", "drop_path", "label_smoothing", "mixup", "cutmix", "random_erasing")
            unused |= {f"classify.{key}" for key in _changed_keys(classify, keys)}
        elif len(classify.lr_multipliers) > 1:
            unused |= {"classify.lr_multipliers"}
        if unused:
            raise ValueError(f"{sorted(unused)[0]} has no effect with run.task={task}. Remove it.")

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of the warm-up, by the linear scaling rule (Goyal et al. 2017)."""
        return self.optim.base_lr * self.train.global_batch / 256

    def accumulation(self, world_size: int) -> int:
        """Return the number of gradient accumulation steps on ``world_size`` processes.

        Raises:
            ConfigError: The global batch is not divisible by the micro-batch times the number of processes.
        """
        batch, micro = self.train.global_batch, self.train.micro_batch
        if batch % (total := micro * world_size):
            step = 2 if self.classify.mixup or self.classify.cutmix else 1  # mixing needs an even micro-batch
            divisor = next((m for m in range(micro, 0, -step) if batch % (m * world_size) == 0), None)
            advice = "No smaller train.micro_batch divides it either. Change train.global_batch or the number of processes."
            if divisor:
                advice = f"Set train.micro_batch={divisor}."
            divided_by = f"train.micro_batch={micro} x {world_size} {'process' if world_size == 1 else 'processes'} = {total}"
            raise ConfigError(f"train.global_batch={batch} is not divisible by {divided_by}. {advice}")
        return batch // total

    def deepspeed_json(self) -> dict[str, Any]:
        """Return the contents of the DeepSpeed file that ``engine.deepspeed`` names.

        Raises:
            ConfigError: There is no such file, it is not a JSON object, or it sets a key that this configuration decides.
        """
        name = self.engine.deepspeed
        shipped = sorted(p.stem for p in SHIPPED_CONFIGS.glob("*.json"))
        path = SHIPPED_CONFIGS / f"{name}.json" if name in shipped else Path(name)
        try:
            content = json.loads(path.read_text())
        except OSError as error:
            raise ConfigError(
                f"engine.deepspeed={name}: cannot be read ({error.strerror}). Set one of {', '.join(shipped)}, "
                "or the path of a JSON file."
            ) from None
        except ValueError as error:
            raise ConfigError(f"engine.deepspeed={name}: not valid JSON ({error}). Correct the file.") from None
        if not isinstance(content, dict):
            raise ConfigError(f"engine.deepspeed={name}: not a JSON object but a {type(content).__name__}. Correct it.")
        for key in OWNED_BY.keys() & content.keys():
            raise ConfigError(
                f"engine.deepspeed={name}: sets {key}, which {OWNED_BY[key]} decides. Remove {key} from the file."
            )
        return dict(content)

    def steps(self, duration: str, dataset_size: int) -> int:
        """Convert a duration to optimizer steps, rounded to the nearest and at least 1, unless the duration is zero.

        Args:
            duration: A number and a unit, such as ``800 epochs``.
            dataset_size: Images per epoch.
        """
        number, unit = duration.split()
        images = {"steps": self.train.global_batch, "epochs": dataset_size, "images": 1}[unit] * float(number)
        return max(round(images / self.train.global_batch), math.ceil(min(images, 1)))

    def to_yaml(self) -> str:
        """Return the whole tree as YAML, defaults included. :func:`load_config` reads it back to an equal Config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None)

    def digest(self) -> str:
        """Return sixteen hexadecimal digits that change with any key."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()[:16]

    def differences(self, other: Config) -> list[str]:
        """List the keys that change what the run computes and differ, as ``section.key: this -> other``.

        Keys that may change on resume (logging, checkpoint intervals, threads, compilation) and ``run.dir`` are ignored.
        """
        found = []
        for section in type(self).model_fields:
            own_section, other_section = getattr(self, section), getattr(other, section)
            for key, field in type(own_section).model_fields.items():
                if may_change_on_resume(field) or (section, key) == ("run", "dir"):
                    continue
                own_value, other_value = getattr(own_section, key), getattr(other_section, key)
                if own_value != other_value:
                    found.append(f"{section}.{key}: {own_value} -> {other_value}")
        return found


def _changed_keys(section: Section, keys: Iterable[str]) -> list[str]:
    """Return those of ``keys`` that do not have their default value."""
    default = type(section)()
    return [key for key in keys if getattr(section, key) != getattr(default, key)]
