"""The metadata of exported weights: everything that is needed to use them.

Every export format stores the metadata under the key ``scale_mae``. A folder also stores it in ``scale_mae.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from scale_mae.config import Config
from scale_mae.config.field_types import may_change_on_resume
from scale_mae.data.crop_boxes import reference_crop_pct
from scale_mae.model.sizes import LAYER_NORM_EPS, SIZES

if TYPE_CHECKING:
    from scale_mae.weights.classifier_heads import ClassifierHead

METADATA_KEY = "scale_mae"
METADATA_FILE = "scale_mae.json"
Pool = Literal["token", "avg"]
POOLING: dict[Pool, str] = {
    "token": "none during training; use the class token (the first token) or the mean of the patch tokens",
    "avg": "the mean of the patch tokens, then fc_norm, which has the weights of the final norm",
}
CLASSIFIER_POOLING: dict[Pool, str] = {
    "token": "the class token after the final norm, then the head",
    "avg": "the mean of the patch tokens, then fc_norm, then the head",
}
CROP_PCT = 0.875  # the reference evaluates with it: resize the short side to 256, cut out the central 224
TIMM_NAMES = {
    "nano": "vit_tiny_patch16_224",
    "tiny": "vit_tiny_patch16_224",
    "small": "vit_small_patch16_224",
    "base": "vit_base_patch16_224.mae",
    "large": "vit_large_patch16_224.mae",
    "huge": "vit_huge_patch14_224.mae",
    "giant": "vit_giant_patch14_224",
    "2b": "vit_huge_patch14_224",
}


def is_classifier(config: Config) -> bool:
    """Return whether a run trains a classifier (fine-tuning or a linear probe) and not a MAE."""
    return config.run.task != "pretrain"


def training_settings(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings that determine the trained weights, except the seed.

    Settings that may change on resume do not influence the weights. The paths of initial weights and of validation images are
    omitted too.

    Args:
        config: A configuration as JSON.
    """
    settings = {}
    for section in ("model", "classify", "data", "optim", "train"):
        fields = getattr(Config.model_fields[section].annotation, "model_fields", {})
        omitted = {name for name, field in fields.items() if may_change_on_resume(field)} | {"init_from", "val_source"}
        settings[section] = {name: value for name, value in config[section].items() if name not in omitted}
    return settings


def build_metadata(
    config: Config,
    step: int,
    image_size: tuple[int, int] | None = None,
    pool: Pool | None = None,
    head: ClassifierHead | None = None,
) -> dict[str, Any]:
    """Return the metadata of a run's weights at a step.

    Args:
        config: The configuration of the run.
        step: Number of optimizer steps done.
        image_size: (height, width) in pixels that the position embeddings were interpolated to. The default is the size of
            training.
        pool: How an encoder pools its tokens (default: ``token``). A classifier pools as it was trained.
        head: The head of a classifier.
    """
    m, size = config.model, SIZES[config.model.size]
    height, width = image_size or m.image_size
    is_resized = (height, width) != m.image_size
    if is_classifier(config):
        pool = "avg" if config.classify.pool == "mean" else "token"
        task_metadata = _classifier_metadata(config, pool, max(height, width), head)
    else:
        pool = pool or "token"
        task_metadata = {"crop_pct": CROP_PCT, "pooling": POOLING[pool], "norm_pixel": m.target == "norm_pixel"}
        task_metadata |= {"mask_ratio": m.mask_ratio}
    return {
        "timm_name": TIMM_NAMES[m.size],
        "timm_kwargs": {
            "img_size": [height, width],
            "patch_size": list(m.patch),
            "embed_dim": size.width,
            "depth": size.depth,
            "num_heads": size.heads,
            "mlp_ratio": size.mlp_ratio,
            "num_classes": len(head.classes) if head else 0,
            "global_pool": pool,
        },
        "image_size": [height, width],
        "patch_size": list(m.patch),
        "position_embeddings": f"interpolated bicubically from {list(m.image_size)}" if is_resized else "as in training",
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "interpolation": "bicubic",
        "layer_norm_eps": LAYER_NORM_EPS,
        **task_metadata,
        "step": step,
        "config_digest": config.digest(),
        "config": config.model_dump(mode="json"),
    }


def _classifier_metadata(config: Config, pool: Pool, side: int, head: ClassifierHead | None) -> dict[str, Any]:
    """Return the entries that a classifier has in place of those for masking and target."""
    return {
        "task": config.run.task,
        "num_classes": len(head.classes) if head else 0,
        "label_names": list(head.classes) if head else [],
        "initialized_from": head.initialized_from if head else "",
        "crop_pct": config.classify.crop_pct or reference_crop_pct(side),
        "pooling": CLASSIFIER_POOLING[pool],
        **({"probe": head.probe} if head and head.probe is not None else {}),
    }


def encoder_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a classifier's encoder, without the entries for the head."""
    kept = {name: value for name, value in metadata.items() if name not in ("num_classes", "label_names")}
    return kept | {"timm_kwargs": metadata["timm_kwargs"] | {"num_classes": 0}}


def class_names(metadata: Mapping[str, Any]) -> list[str]:
    """Return the names of a classifier's outputs, or an empty list if the outputs have numbers only."""
    names = [str(name) for name in metadata.get("label_names", ())]
    return [] if names == [str(number) for number in range(len(names))] else names


def build_pretrained_cfg(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's ``pretrained_cfg``: input size, normalization, names of the first and last layer, license.

    The license is "unknown", because the people who trained the weights decide on it.
    """
    return {
        "architecture": metadata["timm_name"].partition(".")[0],
        "tag": "scale_mae",
        "custom_load": False,
        "input_size": [3, *metadata["image_size"]],
        "fixed_input_size": True,
        "interpolation": metadata["interpolation"],
        "crop_pct": metadata.get("crop_pct", CROP_PCT),
        "crop_mode": "center",
        "mean": list(metadata["mean"]),
        "std": list(metadata["std"]),
        "num_classes": metadata["timm_kwargs"]["num_classes"],
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "unknown",
        "paper_name": "Masked Autoencoders Are Scalable Vision Learners",
        "paper_ids": "arXiv:2111.06377",
    }


def build_timm_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``config.json`` of a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` opens."""
    arguments, names = metadata["timm_kwargs"], class_names(metadata)
    return {
        "architecture": metadata["timm_name"].partition(".")[0],
        "num_classes": arguments["num_classes"],
        **({"label_names": names} if names else {}),
        "num_features": arguments["embed_dim"],
        "global_pool": arguments["global_pool"],
        "model_args": {name: value for name, value in arguments.items() if name != "num_classes"},
        "pretrained_cfg": {k: v for k, v in build_pretrained_cfg(metadata).items() if k != "architecture"},
    }
