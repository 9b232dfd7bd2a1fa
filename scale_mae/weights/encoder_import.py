"""Imports the encoder of any supported weights as tensors and metadata for a timm model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.model.sizes import SIZES
from scale_mae.weights.key_matching import check_keys, count_blocks, read_matching
from scale_mae.weights.metadata import POOLING, TIMM_NAMES, encoder_metadata
from scale_mae.weights.model_builder import build_encoder
from scale_mae.weights.pos_embed_matching import Grid, infer_grid
from scale_mae.weights.weight_import import ImportedWeights, is_decoder_key, locate_weights, read_weights

TIMM_ARGUMENTS = {"img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes", "global_pool"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def import_encoder(path: Path, warn: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Import an encoder from a path; see :func:`extract_encoder`.

    Args:
        path: A path as for :func:`scale_mae.weights.weight_import.locate_weights`.
        warn: Receives one message for each damaged checkpoint that was skipped.
    """
    return extract_encoder(read_weights(locate_weights(path, warn)))


def extract_encoder(weights: ImportedWeights) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Extract the encoder of imported weights.

    Returns:
        The metadata for :func:`scale_mae.weights.model_builder.build_encoder`, and the encoder's state dict.

    Raises:
        CheckpointError: The weights are not those of a plain ViT.
    """
    tensors = {key: t for key, t in weights.tensors.items() if not is_decoder_key(key)}
    fc_norm = {key for key in weights.head_tensors if key.startswith("fc_norm.")}
    if is_mean_pooled(weights):
        tensors |= {key.removeprefix("fc_"): weights.head_tensors[key] for key in fc_norm}
    weights = replace(weights, tensors=tensors)
    own_metadata = weights.provenance.metadata
    metadata = dict(own_metadata or _infer_metadata(weights, (1, 1)))
    if "task" in metadata:  # a classifier that scale_mae trained
        metadata = encoder_metadata(metadata)
    check_keys(_expected_state(metadata, weights.path), weights)
    if not own_metadata:
        metadata = _infer_metadata(weights, infer_grid(weights))
    if fc_norm:
        metadata["timm_kwargs"] = metadata["timm_kwargs"] | {"global_pool": "avg"}
    state = {key: read_matching(weights, key, t) for key, t in _expected_state(metadata, weights.path).items()}
    if metadata["timm_kwargs"]["global_pool"] == "avg":  # then timm names the final norm fc_norm
        state = {re.sub(r"^norm\.", "fc_norm.", key): t for key, t in state.items()}
    return metadata, state


def is_mean_pooled(weights: ImportedWeights) -> bool:
    """Return whether the weights are those of a classifier that was trained with mean pooling."""
    return "norm.weight" not in weights.tensors and any(key.startswith("fc_norm.") for key in weights.head_tensors)


def _expected_state(metadata: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the state dict on the meta device of the encoder that metadata describes, with the keys of class-token pooling."""
    try:
        # timm does not check its arguments; some of them would open other files
        if metadata["timm_name"] not in TIMM_NAMES.values() or metadata["timm_kwargs"].keys() - TIMM_ARGUMENTS:
            raise ValueError("not the encoder of a MAE")
        if metadata["timm_kwargs"]["global_pool"] not in POOLING or metadata["timm_kwargs"]["num_classes"]:
            raise ValueError("the encoder has a head")
        with torch.device("meta"):
            encoder = build_encoder(metadata | {"timm_kwargs": metadata["timm_kwargs"] | {"global_pool": "token"}})
    except Exception as error:  # timm raises anything for wrong arguments
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{path}: the metadata is damaged ({reason[:200]}).") from None
    return dict(encoder.state_dict())


def _infer_metadata(weights: ImportedWeights, grid: Grid) -> dict[str, Any]:
    """Infer the metadata of a third-party encoder with a grid of patches.

    The shapes show all sizes except the number of attention heads. If the provenance does not contain this number either, the
    published model of the same width and depth determines it. Unknown channel statistics are those of ImageNet.
    """
    for key, dimensions in (("patch_embed.proj.weight", 4), ("blocks.0.mlp.fc1.weight", 2), ("pos_embed", 3)):
        if key not in weights.tensors or weights.tensors[key].dim() != dimensions:
            raise CheckpointError(f"{weights.path}: not the weights of a plain ViT ({key} is missing or has another shape).")
    width, _, *patch = weights.tensors["patch_embed.proj.weight"].shape
    hidden, depth = weights.tensors["blocks.0.mlp.fc1.weight"].shape[0], count_blocks(weights.tensors, "blocks")
    provenance = weights.provenance
    published = {s.heads for s in SIZES.values() if (s.width, s.depth) == (width, depth)}
    if provenance.heads is None and len(published) != 1:
        raise CheckpointError(
            f"{weights.path}: the number of attention heads is unknown (width {width}, depth {depth}). "
            "Add timm's config.json to its folder."
        )
    image_size = [grid[0] * patch[0], grid[1] * patch[1]]
    return {
        "timm_name": TIMM_NAMES["tiny"],  # any plain ViT, because timm_kwargs override its sizes
        "timm_kwargs": {
            "img_size": image_size,
            "patch_size": patch,
            "embed_dim": width,
            "depth": depth,
            "num_heads": provenance.heads or published.pop(),
            "mlp_ratio": (hidden + 0.5) / width,  # timm rounds the product down
            "num_classes": 0,
            "global_pool": "token",
        },
        "image_size": image_size,
        "patch_size": patch,
        "mean": list(provenance.mean or IMAGENET_MEAN),
        "std": list(provenance.std or IMAGENET_STD),
        "interpolation": "bicubic",
        "layer_norm_eps": provenance.layer_norm_eps,
        "step": provenance.step,
    }
