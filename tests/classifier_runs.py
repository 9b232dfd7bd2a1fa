"""Three short classifier runs for tests of their weights.

``mean`` fine-tunes all blocks with mean pooling, ``token`` fine-tunes the last block with the class token, and ``probe`` trains
linear probes.
"""

from pathlib import Path

import torch
from classifiers import class_folders
from ranks import run_ranks

from scale_mae import load_config
from scale_mae.checkpoint.discovery import locate_checkpoint
from scale_mae.checkpoint.paths import DEEPSPEED_TAG
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.weights.classifier_initialization import build_classifier_from_config

IMAGE_SIZE, STEP, LR_MULTIPLIERS = 32, 3, (1e-4, 1.0, 3.0)
CLASSES = [f"n0000000{c}" for c in range(10)]


def build_configs(folder):
    common = {
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
    finetune = {"optim.base_lr": 0.3, "optim.layer_decay": 1.0}
    mean = finetune | {"optim.ema_decay": 0.9}
    token = finetune | {"classify.pool": "token", "classify.trainable_blocks": 1}
    token |= {"train.precision": "bf16", "engine.deepspeed": "zero3"}
    probe = {
        "classify.val_source": str(folder / "train"),
        "classify.lr_multipliers": list(LR_MULTIPLIERS),
        "optim.name": "adamw",
        "optim.base_lr": 1.0,
    }
    runs = {"mean": ("finetune_demo", mean), "token": ("finetune_demo", token), "probe": ("linprobe_demo", probe)}
    return {
        name: load_config(recipe, common | overrides | {"run.dir": str(folder / name)})
        for name, (recipe, overrides) in runs.items()
    }


def random_images(count):
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


def _train_all(configs):
    from scale_mae.distributed.process_group import process_group
    from scale_mae.distributed.signals import StopRequest
    from scale_mae.training.trainer import Trainer
    from scale_mae.training.watchdog import Watchdog

    with process_group() as world, StopRequest() as stop:
        for config in configs:
            Trainer(config, world, stop, Watchdog(0, 0)).train()


def train_classifiers(folder):
    """Train the three runs on two ranks.

    Returns:
        For each run its directory, and the trained model in evaluation mode. ``model.best`` is the number of the best probe.
    """
    configs = build_configs(folder)
    run_ranks(2, _train_all, list(configs.values()))
    runs = {}
    for name, config in configs.items():
        reader = ZeroReader(locate_checkpoint(config.run.dir, print) / DEEPSPEED_TAG)
        model = build_classifier_from_config(config, len(CLASSES))
        if name == "probe":
            model.add_probes(LR_MULTIPLIERS)
        model.load_state_dict(dict(reader), strict=True)
        model.best = reader.state["classifier"]["best_probe"]
        runs[name] = (Path(config.run.dir), model.eval())
    assert model.best != 0  # the first probe learns almost nothing
    return runs


@torch.inference_mode()
def logits(model, images, probe=None):
    """Return the logits of a model of scale_mae or timm. For linear probes, return those of one probe, by default the best."""
    outputs = model(images)
    outputs = getattr(outputs, "logits", outputs)
    return outputs if outputs.dim() == 2 else outputs[model.best if probe is None else probe]
