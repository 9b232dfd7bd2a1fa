"""The complete DeepSpeed configuration of a run: the user's JSON file plus the keys that this project's config owns."""

from __future__ import annotations

from typing import Any

from scale_mae.config import Config, ConfigError


def build_deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The complete DeepSpeed configuration: the sharding of ``engine.deepspeed``, the rest from Config.

    Raises:
        ConfigError: no such file, or one that asks for what checkpoints here do not cover.
    """
    content = config.deepspeed_json()
    zero = content.get("zero_optimization")
    for key, value in zero.items() if isinstance(zero, dict) else ():
        nvme = isinstance(value, dict) and value.get("device") == "nvme"
        if nvme or (key == "elastic_checkpoint" and value):
            raise ConfigError(
                f"engine.deepspeed={config.engine.deepspeed}: {key} {'on nvme ' if nvme else ''}is not supported; "
                f"{'offload to cpu' if nvme else 'runs resume on any number of processes without it'}"
            )
        if key == "compute_grad_norm" and not value:
            raise ConfigError(
                f"engine.deepspeed={config.engine.deepspeed}: {key}=false would let bad gradients pass; leave it out"
            )
    return content | {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": config.accumulation(world_size),
        # explicit, because leaving it out means clipping at 1.0 to DeepSpeed
        "gradient_clipping": config.optim.clip_grad_norm or 0.0,
        # FiniteGuard checks gradients without waiting for the accelerator, as DeepSpeed's own check of bf16 ones would
        "bf16": {"enabled": config.train.precision == "bf16", "check_grad_overflow": False},
        "fp16": {"enabled": config.train.precision == "fp16", "loss_scale": 0},
        "steps_per_print": None,
    }
