"""Short runs of our own classifiers, as checkpoints on disk, for whatever takes their weights."""

import functools
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from ranks import run_ranks
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from scale_mae.config import Config
from scale_mae.model.positions import sincos_table

SIDE, PATCH, WIDTH = 32, 4, 96
CLASSES = [f"n0000000{c}" for c in range(10)]
STEP = 3
SWEEP = (1.0, 0.1, 10.0)
STATISTICS = {"mean": (0.286,) * 3, "std": (0.353,) * 3}


class Probes(nn.Module):
    """BatchNorm and the linear layers of a sweep, on one input."""

    def __init__(self, classes):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, affine=False, eps=1e-6)
        self.probes = nn.ModuleList(nn.Linear(WIDTH, classes) for _ in SWEEP)

    def forward(self, features):
        normed = self.norm(features)
        return torch.stack([probe(normed) for probe in self.probes])


class Classifier(VisionTransformer):
    """A classifier with the names that a checkpoint of ours has."""

    decoder_blocks = ()

    def __init__(self, config):
        pool = "avg" if config.classify.pool == "mean" else "token"
        sizes = {"embed_dim": WIDTH, "depth": 6, "num_heads": 3, "num_classes": len(CLASSES)}
        norm = functools.partial(nn.LayerNorm, eps=1e-6)
        super().__init__(img_size=SIDE, patch_size=PATCH, global_pool=pool, norm_layer=norm, **sizes)
        nn.init.normal_(self.head.weight, std=0.1)
        for name, parameter in self.named_parameters():  # what training would do to them in the end
            if "norm" in name or name.endswith(".bias"):
                parameter.data += torch.randn_like(parameter) * 0.2
        self.pos_embed.data = sincos_table(WIDTH, (SIDE // PATCH,) * 2) + 0.02 * torch.randn_like(self.pos_embed)
        if config.run.task == "linprobe":
            freeze(self, lambda name: True)
            self.head = Probes(len(CLASSES))
        elif config.classify.train_blocks is not None:
            freeze(self, lambda name: not name.startswith(("head.", "norm.", "blocks.5.")))

    def forward(self, images, labels=None):
        logits = super().forward(images)
        if labels is None:
            return logits
        all_logits = logits if logits.dim() == 3 else logits[None]
        return SimpleNamespace(loss=sum(F.cross_entropy(each, labels) for each in all_logits))


def freeze(model, frozen):
    """Parameters become buffers of the same names."""
    for name, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            if frozen(f"{name}.{key}".removeprefix(".")):
                delattr(module, key)
                module.register_buffer(key, parameter.detach().clone())


def run_config(run_dir, task, pool="mean", stage="zero2", classify=(), **optim):
    return Config.model_validate({
        "run": {"dir": str(run_dir), "task": task, "seed": 7},
        "model": {"size": "nano", "image_size": SIDE, "patch_size": PATCH},
        "classify": {"pool": pool, **dict(classify)},
        "data": {"source": "demo:train", **STATISTICS},
        "optim": optim,
        "train": {"global_batch": 8, "micro_batch": 4, "precision": "fp32"},
        "engine": {"deepspeed": stage},
    })  # fmt: skip


def configs(folder):
    probing = {"sweep": SWEEP}
    return {
        "mean": run_config(folder / "mean", "finetune", ema=0.9, stage="zero2"),
        "token": run_config(folder / "token", "finetune", "token", stage="zero3", classify={"train_blocks": 1}),
        "probe": run_config(folder / "probe", "linprobe", "token", stage="zero1", classify=probing),
    }


def images(count, seed=1):
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def _train(config, ranks):
    """Some steps and a checkpoint; the live state, by name."""
    from deepspeed.utils import safe_get_full_fp32_param

    from scale_mae.checkpoint.commit import Saver
    from scale_mae.engine.deepspeed import Engine
    from scale_mae.engine.optim import parameter_names

    torch.manual_seed(0)
    Path(config.run.dir).mkdir(exist_ok=True)
    (Path(config.run.dir) / "config.yaml").write_text(config.to_yaml())
    engine = Engine(Classifier(config), config, ranks)
    engine.model.train()
    for step in range(STEP):
        labels = torch.arange(4) + 4 * ranks.rank
        engine.forward_backward(images(4, seed=10 * step + ranks.rank), labels)
        engine.step(1e-2)
    for master, state in engine._engine.basic_optimizer.state.items():
        state["ema"] = 0.5 * master.detach()
    state = {
        "classifier": {"classes": CLASSES, "best_probe": 1 if config.run.task == "linprobe" else 0},
        "parameter_groups": parameter_names(engine.model),
    }
    saver = Saver(Path(config.run.dir), config, ranks, zero_stage=engine.stage, nbytes=0, alone=0)
    saver.save(STEP, lambda folder: engine.save(folder, state))
    live = {name: buffer.numpy().copy() for name, buffer in engine.model.named_buffers()}
    for name, parameter in engine.model.named_parameters():
        value = safe_get_full_fp32_param(parameter) if engine.stage else parameter.detach()
        live[name] = value.numpy().copy()
    return live


def _train_all(several):
    from scale_mae.engine.distributed import world

    with world() as ranks:
        return {name: _train(config, ranks) for name, config in several.items()}


def make_own_runs(folder):
    """Name -> (run directory, the live model on the host, in evaluation mode)."""
    several = configs(folder)
    live = run_ranks(2, _train_all, several)[0]
    made = {}
    for name, config in several.items():
        model = Classifier(config).eval()
        model.load_state_dict({key: torch.from_numpy(value) for key, value in live[name].items()}, strict=True)
        made[name] = (Path(config.run.dir), model)
    return made


@torch.inference_mode()
def logits(model, pixels, probe=1):
    """What a live model computes; of a sweep that of one probe."""
    found = model(pixels)
    return found[probe] if found.dim() == 3 else found
