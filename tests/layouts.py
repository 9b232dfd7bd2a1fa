"""A short run in every layout that DeepSpeed writes for us, with the live weights, for whatever reads checkpoints."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from ranks import run_ranks
from test_trainer import make_config

from scale_mae.checkpoint.manifest import read_manifest
from scale_mae.checkpoint.paths import MANIFEST_FILE, checkpoint_name

LAYOUTS = [(stage, precision) for stage in ("zero0", "zero1", "zero2", "zero3") for precision in ("fp32", "bf16")]


def train_and_tell(configs):
    """Several short runs in one set of ranks; the live fp32 weights of each, as DeepSpeed itself gathers them."""
    from deepspeed.utils import safe_get_full_fp32_param

    from scale_mae.distributed.process_group import process_group
    from scale_mae.distributed.signals import StopRequest
    from scale_mae.engine.deepspeed import Engine
    from scale_mae.training.trainer import Trainer
    from scale_mae.training.watchdog import Watchdog

    torch.set_num_threads(1)
    told = []
    with process_group() as ranks, StopRequest() as stop:
        for config in configs:
            run = Trainer(config, ranks, stop, Watchdog(0, 0))
            run.train()
            assert isinstance(run.engine, Engine)
            sharded = run.engine.zero_stage > 0
            masters = getattr(run.engine._optimizer, "fp32_groups_flat", None)
            assert masters is None or sharded or config.train.precision != "fp32"
            live = {}
            for name, p in run.engine.model.named_parameters():
                value = safe_get_full_fp32_param(p) if sharded else p.detach()
                live[name] = value.float().numpy().copy()
            told.append(live)
    return told


def make_runs(folder):
    """A two-step run of two ranks in every layout: (stage, precision) -> (run directory, live weights)."""
    setting = {"train.duration": "3 steps", "optim.warmup": "1 steps", "optim.base_lr": 0.1}
    configs = [make_config(folder / f"{s}-{p}", **setting, **{"engine.deepspeed": s, "train.precision": p}) for s, p in LAYOUTS]
    live = run_ranks(2, train_and_tell, configs)[0]
    return {layout: (Path(c.run.dir), weights) for layout, c, weights in zip(LAYOUTS, configs, live, strict=True)}


def copy_as(checkpoint, step):
    """A copy beside a checkpoint that passes for one of another step."""
    copy = Path(shutil.copytree(checkpoint, checkpoint.with_name(checkpoint_name(step))))
    (copy / MANIFEST_FILE).write_text(replace(read_manifest(checkpoint), step=step).to_json())
    return copy
