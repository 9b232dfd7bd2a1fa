"""Small classifiers and data sets for tests: a random ViT with a fitted head, and Fashion-MNIST in the folders of each set."""

import functools
import io
import json
import shutil
import tempfile
import weakref
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from scale_mae.data.index_builder import list_source
from scale_mae.evaluation.corruption_error import CORRUPTIONS, EXTRA_CORRUPTIONS, SEVERITIES
from scale_mae.evaluation.features import LabeledSource, features
from scale_mae.evaluation.logistic_regression import fit_logistic_regression

ARCHITECTURE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
WNIDS = [f"n0000000{c}" for c in range(10)]
MEAN, STD = (0.286,) * 3, (0.353,) * 3


def vit(pool="avg", seed=0, **options):
    torch.manual_seed(seed)
    arguments = ARCHITECTURE | {
        "num_classes": 10,
        "global_pool": pool,
        "norm_layer": functools.partial(torch.nn.LayerNorm, eps=1e-6),
    }
    return timm.create_model("vit_tiny_patch16_224", **(arguments | options)).eval()


def write_timm(folder, model, pool="avg", config=True, name="model.safetensors"):
    """Write a folder as timm writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".pth"):
        torch.save({"model": model.state_dict(), "epoch": 99}, folder / name)
    else:
        save_file(model.state_dict(), folder / name)
    args = {name: value for name, value in ARCHITECTURE.items() if name != "num_classes"}
    content = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": model.num_classes,
        "global_pool": pool,
        "model_args": args,
    }
    content["pretrained_cfg"] = {"mean": MEAN, "std": STD}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@functools.cache
def fitted_classifier():
    """Return a folder with a Fashion-MNIST classifier: a random ViT, and a head from logistic regression."""
    from scale_mae.evaluation.models import load_frozen_encoder

    folder = tempfile.TemporaryDirectory()
    weakref.finalize(fitted_classifier, folder.cleanup)
    path, model = Path(folder.name), vit()
    write_timm(path, model)
    subject, train = load_frozen_encoder(path), LabeledSource.open("demo:train")
    rows = range(0, len(train.index), 20)
    values = features(subject, train.index, rows, 100).values.clone()
    deviation, mean = torch.std_mean(values, dim=0)
    solution = fit_logistic_regression((values - mean) / deviation, train.labels[list(rows)], 10, 1e-3)
    with torch.no_grad():
        model.head.weight.copy_((solution[:-1] / deviation[:, None]).T)
        model.head.bias.copy_(solution[-1] - (mean / deviation) @ solution[:-1])
    return write_timm(path, model)


@functools.cache
def fashion(per_class=4):
    """Return validation images, sorted by class: a list of (class, image of 28 x 28 pixels)."""
    index = list_source("demo:val")
    labels = index.entries["label"]
    rows = [row for c in range(10) for row in np.flatnonzero(labels == c)[:per_class].tolist()]
    return [(int(labels[row]), Image.open(io.BytesIO(index.read(row))).convert("RGB")) for row in rows]


def write_image(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "JPEG", quality=95)


def class_folders(root, classes=range(10), size=None, per_class=4):
    """Write ``root/n0000000C/I.JPEG``."""
    for i, (c, image) in enumerate(fashion(per_class)):
        if c in classes:
            write_image(root / WNIDS[c] / f"{i}.JPEG", image.resize((size, size)) if size else image)
    return root


def corrupted_folders(root, per_class=1, extra=True):
    """Write folders like those of ImageNet-C: ``root/corruption/severity/wnid/I.JPEG``.

    Every corruption is noise that grows with the severity.
    """
    corruptions = CORRUPTIONS + (EXTRA_CORRUPTIONS if extra else ())
    for number, corruption in enumerate(corruptions):
        for severity in SEVERITIES:
            for i, (c, image) in enumerate(fashion(per_class)):
                pixels = np.asarray(image.resize((40, 40)), np.float64)
                noise = np.random.default_rng([number, severity, i]).normal(0, (number + 1) * severity * 3, pixels.shape)
                noisy = Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))
                write_image(root / corruption / str(severity) / WNIDS[c] / f"{i}.JPEG", noisy)
    return root


def classes_file(path, names=WNIDS):
    path.write_text("".join(f"{name}\n" for name in names))
    return str(path)


def copy_folder(source, target):
    return Path(shutil.copytree(source, target))
