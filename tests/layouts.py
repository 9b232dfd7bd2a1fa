"""A short run in every checkpoint layout of this project (ZeRO stage and precision), with the live weights."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from ranks import run_ranks
from test_trainer import make_config

from scale_mae.checkpoint.manifest import read_manifest
from scale_mae.checkpoint.paths import MANIFEST_FILE, format_checkpoint_name

LAYOUTS = [(stage, precision) for stage in ("zero0", "zero1", "zero2", "zero3") for precision in ("fp32", "bf16")]


def train_all(configs):
    """Train several short runs on the same ranks. Return the live fp32 weights of each, as DeepSpeed gathers them."""
    from deepspeed.utils import safe_get_full_fp32_param

    from scale_mae.distributed.process_group import process_group
    from scale_mae.distributed.signals import StopRequest
    from scale_mae.engine.deepspeed import Engine
    from scale_mae.training.trainer import Trainer
    from scale_mae.training.watchdog import Watchdog

    torch.set_num_threads(1)
    weights_of_runs = []
    with process_group() as world, StopRequest() as stop:
        for config in configs:
            trainer = Trainer(config, world, stop, Watchdog(0, 0))
            trainer.train()
            assert isinstance(trainer.engine, Engine)
            sharded = trainer.engine.zero_stage > 0
            masters = getattr(trainer.engine._optimizer, "fp32_groups_flat", None)
            assert masters is None or sharded or config.train.precision != "fp32"
            weights = {}
            for name, p in trainer.engine.model.named_parameters():
                value = safe_get_full_fp32_param(p) if sharded else p.detach()
                weights[name] = value.float().numpy().copy()
            weights_of_runs.append(weights)
    return weights_of_runs


def make_runs(folder):
    """Train three steps on two ranks in every layout. Return a dict: (stage, precision) -> (run directory, live weights)."""
    overrides = {"train.duration": "3 steps", "optim.warmup": "1 steps", "optim.base_lr": 0.1}
    configs = [
        make_config(folder / f"{s}-{p}", **overrides, **{"engine.deepspeed": s, "train.precision": p}) for s, p in LAYOUTS
    ]
    live_weights = run_ranks(2, train_all, configs)[0]
    return {layout: (Path(c.run.dir), weights) for layout, c, weights in zip(LAYOUTS, configs, live_weights, strict=True)}


def copy_as(checkpoint, step):
    """Copy a checkpoint to the name and the manifest of another step."""
    copy = Path(shutil.copytree(checkpoint, checkpoint.with_name(format_checkpoint_name(step))))
    (copy / MANIFEST_FILE).write_text(replace(read_manifest(checkpoint), step=step).to_json())
    return copy
