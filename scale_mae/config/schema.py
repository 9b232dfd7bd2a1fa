"""The configuration tree of a run, and the checks across its sections."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import yaml
from pydantic import model_validator

from scale_mae.config.errors import ConfigError
from scale_mae.config.sections import (
    CheckpointConfig,
    ClassifyConfig,
    DataConfig,
    EngineConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RollbackConfig,
    RunConfig,
    Section,
    TrainConfig,
    may_change_on_resume,
)

PACKAGE = Path(__file__).parents[1]
SHIPPED = PACKAGE / "ds_configs" if (PACKAGE / "ds_configs").is_dir() else PACKAGE.parent / "ds_configs"


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
    rollback: RollbackConfig = RollbackConfig()
    """When a run goes back to its last good checkpoint."""

    @model_validator(mode="after")
    def _fits(self) -> Config:
        self._fits_task()
        stage, batch = self.engine.deepspeed, self.train.micro_batch
        if self.optim.name == "lars" and stage != "zero0":
            raise ValueError(f"optim.name=lars needs whole parameters, which engine.deepspeed={stage} cuts up; use zero0")
        if (self.classify.mixup or self.classify.cutmix) and batch % 2:
            raise ValueError(f"train.micro_batch={batch} is odd; classify.mixup and cutmix mix pairs of images")
        frozen = self.classify.trainable_blocks is not None and self.train.precision != "fp32"
        if (
            frozen and self.train.activation_checkpointing == "offload"
        ):  # fairscale would recompute what is not frozen in another precision
            raise ValueError(
                "train.activation_checkpointing=offload does not go with classify.trainable_blocks in 16 bits; use full"
            )
        if self.engine.compile and self.train.activation_checkpointing == "offload":
            raise ValueError(
                "engine.compile=True does nothing for train.activation_checkpointing=offload; use full, or do not compile"
            )
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
            own = ("trainable_blocks", "drop_path", "label_smoothing", "mixup", "cutmix", "random_erasing")
            unused |= {f"classify.{key}" for key in own if getattr(c, key) != getattr(ClassifyConfig(), key)}
        elif len(c.lr_multipliers) > 1:
            unused |= {"classify.lr_multipliers"}
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
            "activation_checkpointing": "train.activation_checkpointing",
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

        Keys that may change on resume (logging, checkpoint intervals, threads, compilation) and the run directory do not count.
        """
        found = []
        for section in type(self).model_fields:
            mine, theirs = getattr(self, section), getattr(other, section)
            for key, field in type(mine).model_fields.items():
                if (
                    getattr(mine, key) != getattr(theirs, key)
                    and not may_change_on_resume(field)
                    and (section, key) != ("run", "dir")
                ):
                    found.append(f"{section}.{key}: {getattr(mine, key)} -> {getattr(theirs, key)}")
        return found
