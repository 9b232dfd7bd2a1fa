"""The DeepSpeed configuration of a run: the JSON file of ``engine.deepspeed`` plus the keys that the config sets."""

from __future__ import annotations

from typing import Any

from scale_mae.config import Config, ConfigError


def build_deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """Return the complete DeepSpeed configuration. Sharding and offload come from the JSON file, the rest from ``config``.

    Raises:
        ConfigError: The file does not exist, or it sets an option that this project does not support.
    """
    content = config.deepspeed_json()
    _check_zero_options(content.get("zero_optimization"), config.engine.deepspeed)
    return content | {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": config.accumulation(world_size),
        "gradient_clipping": config.optim.clip_grad_norm or 0.0,  # always set, because DeepSpeed's default clips at 1.0
        # StepSkipper checks the gradients without waiting for the accelerator; DeepSpeed's check of bf16 gradients waits.
        "bf16": {"enabled": config.train.precision == "bf16", "check_grad_overflow": False},
        "fp16": {"enabled": config.train.precision == "fp16", "loss_scale": 0},  # 0: dynamic loss scale
        "steps_per_print": None,
    }


def _check_zero_options(zero: Any, file: str) -> None:
    options = zero if isinstance(zero, dict) else {}  # DeepSpeed reports a value of another type
    for key, value in options.items():
        if isinstance(value, dict) and value.get("device") == "nvme":
            raise ConfigError(f"engine.deepspeed={file}: {key} to NVMe is not supported. Offload to the CPU instead.")
        if key == "elastic_checkpoint" and value:
            raise ConfigError(
                f"engine.deepspeed={file}: elastic_checkpoint is not supported. Remove it: a run can resume on any number of "
                "processes without it."
            )
        if key == "compute_grad_norm" and not value:
            raise ConfigError(
                f"engine.deepspeed={file}: compute_grad_norm=false disables the check that skips steps with non-finite "
                "gradients. Remove it."
            )
