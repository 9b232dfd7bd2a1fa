"""Short runs of our own classifiers for whatever takes their weights: fine-tuned as a whole and in part, and probed."""

from pathlib import Path

import torch
from classifiers import class_folders
from ranks import run_ranks

from scale_mae import load_config
from scale_mae.checkpoint.discovery import locate_checkpoint
from scale_mae.checkpoint.paths import DEEPSPEED_TAG
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.weights.classifier_initialization import build_classifier_from_config

SIDE, STEP, SWEEP = 32, 3, (1e-4, 1.0, 3.0)
CLASSES = [f"n0000000{c}" for c in range(10)]


def configs(folder):
    setting = {
        "data.source": str(class_folders(folder / "train", per_class=4)),
        "data.threads": 1,
        "classify.val_source": None,
        "model.init_from": None,
        "run.seed": 7,
        "train.duration": f"{STEP} steps",
        "train.global_batch": 16,
        "train.micro_batch": 8,
        "optim.warmup": "1 steps",
        "log.interval": 1,
        "log.metrics_port": None,
    }
    fast = {"optim.base_lr": 0.3, "optim.layer_decay": 1.0}
    partly = {"classify.pool": "token", "classify.trainable_blocks": 1, "train.precision": "bf16", "engine.deepspeed": "zero3"}
    probing = {
        "classify.val_source": str(folder / "train"),
        "classify.lr_multipliers": list(SWEEP),
        "optim.name": "adamw",
        "optim.base_lr": 1.0,
    }
    given = {
        "mean": ("finetune_demo", {"optim.ema_decay": 0.9} | fast),
        "token": ("finetune_demo", partly | fast),
        "probe": ("linprobe_demo", probing),
    }
    return {
        name: load_config(recipe, setting | more | {"run.dir": str(folder / name)}) for name, (recipe, more) in given.items()
    }


def images(count):
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def _train_all(several):
    from scale_mae.distributed.process_group import process_group
    from scale_mae.distributed.signals import StopRequest
    from scale_mae.training.trainer import Trainer
    from scale_mae.training.watchdog import Watchdog

    with process_group() as ranks, StopRequest() as stop:
        for config in several:
            Trainer(config, ranks, stop, Watchdog(0, 0)).train()


def make_own_runs(folder):
    """Name -> (run directory, the trained model on the host, in evaluation mode; ``best`` is its best probe)."""
    several = configs(folder)
    run_ranks(2, _train_all, list(several.values()))
    made = {}
    for name, config in several.items():
        reader = ZeroReader(locate_checkpoint(config.run.dir, print) / DEEPSPEED_TAG)
        model = build_classifier_from_config(config, len(CLASSES))
        if name == "probe":
            model.add_probes(SWEEP)
        model.load_state_dict(dict(reader), strict=True)
        model.best = reader.state["classifier"]["best_probe"]
        made[name] = (Path(config.run.dir), model.eval())
    assert model.best != 0  # the first probe hardly learns
    return made


@torch.inference_mode()
def logits(model, pixels, probe=None):
    """What a trained model computes, or a timm model; of a sweep that of one probe."""
    found = model(pixels)
    found = getattr(found, "logits", found)
    return found if found.dim() == 2 else found[model.best if probe is None else probe]
