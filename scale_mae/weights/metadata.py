"""What exported weights say about themselves: all that is needed to use them, in every format under the key ``scale_mae``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from scale_mae.config import Config
from scale_mae.config.field_types import may_change_on_resume
from scale_mae.data.crop_boxes import reference_crop_pct
from scale_mae.model.sizes import LAYER_NORM_EPS, SIZES

if TYPE_CHECKING:
    from scale_mae.weights.classifier_heads import Head

METADATA_KEY = "scale_mae"
FACTS_FILE = "scale_mae.json"  # the same in a folder
Pool = Literal["token", "avg"]
POOLING: dict[Pool, str] = {
    "token": "none applied in training; class token first, or the mean of the patch tokens",
    "avg": "the mean of the patch tokens, then fc_norm, which holds the weights of the final norm",
}
CLASSIFIER_POOLING: dict[Pool, str] = {
    "token": "the class token after the final norm, then the head",
    "avg": "the mean of the patch tokens, then fc_norm, then the head",
}
CROP_PCT = 0.875  # of the reference's evaluation: resized to 256, the central 224 cut out
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
    """Whether a run trains a classifier, fine-tuned or a linear probe; else a MAE."""
    return config.run.task != "pretrain"


def recipe_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What of a config, as JSON, makes weights what they are but for the seed: no key that may change on resume, no path."""
    found = {}
    for section in ("model", "classify", "data", "optim", "train"):
        fields = getattr(Config.model_fields[section].annotation, "model_fields", {})
        left_out = {name for name, field in fields.items() if may_change_on_resume(field)} | {"init_from", "val_source"}
        found[section] = {name: value for name, value in config[section].items() if name not in left_out}
    return found


def describe(
    config: Config,
    step: int,
    image_size: tuple[int, int] | None = None,
    pool: Pool | None = None,
    head: Head | None = None,
) -> dict[str, Any]:
    """The facts about a run's weights at a step.

    Args:
        config: of the run.
        step: optimizer steps done.
        image_size: (height, width) that the position tables were interpolated to; None: as in training.
        pool: how an encoder makes one vector of an image (default: ``token``); a classifier does as it was trained.
        head: of a classifier.
    """
    m, size = config.model, SIZES[config.model.size]
    height, width = image_size or m.image_size
    resized = (height, width) != m.image_size
    if is_classifier(config):
        pool = "avg" if config.classify.pool == "mean" else "token"
        own = _classifier_facts(config, pool, max(height, width), head)
    else:
        pool = pool or "token"
        own = {"crop_pct": CROP_PCT, "pooling": POOLING[pool], "norm_pixel": m.target == "norm_pixel"}
        own |= {"mask_ratio": m.mask_ratio}
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
        "position_tables": f"interpolated bicubically from {list(m.image_size)}" if resized else "as in training",
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "interpolation": "bicubic",
        "layer_norm_eps": LAYER_NORM_EPS,
        **own,
        "step": step,
        "config_digest": config.digest(),
        "config": config.model_dump(mode="json"),
    }


def _classifier_facts(config: Config, pool: Pool, side: int, head: Head | None) -> dict[str, Any]:
    """What the facts of a classifier say in place of masking and target."""
    return {
        "task": config.run.task,
        "num_classes": len(head.classes) if head else 0,
        "label_names": list(head.classes) if head else [],
        "began_with": head.began_with if head else "",
        "crop_pct": config.classify.crop_pct or reference_crop_pct(side),
        "pooling": CLASSIFIER_POOLING[pool],
        **({"probe": head.probe} if head and head.probe is not None else {}),
    }


def without_head(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts about a classifier as those about its encoder."""
    kept = {name: value for name, value in facts.items() if name not in ("num_classes", "label_names")}
    return kept | {"timm_kwargs": facts["timm_kwargs"] | {"num_classes": 0}}


def class_names(facts: Mapping[str, Any]) -> list[str]:
    """Names of a classifier's outputs; none where they are but numbered."""
    names = [str(name) for name in facts.get("label_names", ())]
    return [] if names == [str(number) for number in range(len(names))] else names


def pretrained_cfg(facts: Mapping[str, Any]) -> dict[str, Any]:
    """timm's own account of weights: input, normalisation, the names of the first and the last layer, the licence.

    Weights are the work of who trained them, so the licence is theirs to state.
    """
    return {
        "architecture": facts["timm_name"].partition(".")[0],
        "tag": "scale_mae",
        "custom_load": False,
        "input_size": [3, *facts["image_size"]],
        "fixed_input_size": True,
        "interpolation": facts["interpolation"],
        "crop_pct": facts.get("crop_pct", CROP_PCT),
        "crop_mode": "center",
        "mean": list(facts["mean"]),
        "std": list(facts["std"]),
        "num_classes": facts["timm_kwargs"]["num_classes"],
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "unknown",
        "paper_name": "Masked Autoencoders Are Scalable Vision Learners",
        "paper_ids": "arXiv:2111.06377",
    }


def timm_config(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` opens."""
    arguments, names = facts["timm_kwargs"], class_names(facts)
    return {
        "architecture": facts["timm_name"].partition(".")[0],
        "num_classes": arguments["num_classes"],
        **({"label_names": names} if names else {}),
        "num_features": arguments["embed_dim"],
        "global_pool": arguments["global_pool"],
        "model_args": {name: value for name, value in arguments.items() if name != "num_classes"},
        "pretrained_cfg": {k: v for k, v in pretrained_cfg(facts).items() if k != "architecture"},
    }
