"""What exported weights say about themselves: all that is needed to use them, in every format under the key ``scale_mae``."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Literal

from scale_mae import __version__
from scale_mae.config import Config
from scale_mae.model.sizes import LAYER_NORM_EPS, SIZES

METADATA_KEY = "scale_mae"
FACTS_FILE = "scale_mae.json"  # the same in a folder
Pool = Literal["token", "avg"]
POOLING: dict[Pool, str] = {
    "token": "none applied in training; class token first, or the mean of the patch tokens",
    "avg": "the mean of the patch tokens, then fc_norm, which holds the weights of the final norm",
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


def describe(config: Config, step: int, image_size: tuple[int, int] | None = None, pool: Pool = "token") -> dict[str, Any]:
    """The facts about a run's weights at a step.

    Args:
        config: of the run.
        step: optimizer steps done.
        image_size: (height, width) that the position tables were interpolated to; None: as in training.
        pool: how the encoder makes one vector of an image.
    """
    m, size = config.model, SIZES[config.model.size]
    height, width = image_size or m.image_size
    resized = (height, width) != m.image_size
    return {
        "timm_name": TIMM_NAMES[m.size],
        "timm_kwargs": {
            "img_size": [height, width],
            "patch_size": list(m.patch),
            "embed_dim": size.width,
            "depth": size.depth,
            "num_heads": size.heads,
            "mlp_ratio": size.mlp_ratio,
            "num_classes": 0,
            "global_pool": pool,
        },
        "image_size": [height, width],
        "patch_size": list(m.patch),
        "position_tables": f"interpolated bicubically from {list(m.image_size)}" if resized else "as in training",
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "interpolation": "bicubic",
        "crop_pct": CROP_PCT,
        "layer_norm_eps": LAYER_NORM_EPS,
        "pooling": POOLING[pool],
        "norm_pixel": m.target == "norm_pixel",
        "mask_ratio": m.mask_ratio,
        "step": step,
        "config_digest": config.digest(),
        "config": config.model_dump(mode="json"),
    }


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
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "unknown",
        "paper_name": "Masked Autoencoders Are Scalable Vision Learners",
        "paper_ids": "arXiv:2111.06377",
    }


def timm_config(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` opens."""
    arguments = facts["timm_kwargs"]
    return {
        "architecture": facts["timm_name"].partition(".")[0],
        "num_classes": 0,
        "num_features": arguments["embed_dim"],
        "global_pool": arguments["global_pool"],
        "model_args": {name: value for name, value in arguments.items() if name != "num_classes"},
        "pretrained_cfg": {k: v for k, v in pretrained_cfg(facts).items() if k != "architecture"},
    }


def versions() -> dict[str, str]:
    """What wrote a checkpoint: Python, this package, and those that its files depend on."""
    ours = {"python": platform.python_version(), "scale-mae": __version__}
    return ours | {p: version(p) for p in ("torch", "deepspeed", "timm")}
