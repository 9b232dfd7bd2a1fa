"""Strict matching of weights against a model: keys, shapes, dtypes, finite values.

A mismatch raises an error with the key, both shapes, and the config key to change.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.model.sizes import SIZES
from scale_mae.weights.weight_import import ImportedWeights, is_decoder_key

# Parts of other ViTs, by patterns of their keys, that a MAE does not have.
UNSUPPORTED_PARTS = {
    r"\.(ls\d|gamma_\d|layer_scale\w*)": "layer scale",
    r"reg_token|register": "register tokens",
    r"[qk]_norm": "query and key normalization",
    r"dist_token|head_dist|distillation": "distillation token",
    r"norm_pre|pre_norm": "norm before the blocks",
    r"rel_pos|relative_position|rope": "relative positions",
    r"attn_pool": "attention pooling",
    r"\.mlp\.(w\d|fc1_|gate|norm)": "gated MLP",
}


def count_blocks(keys: Collection[str], stack: str) -> int:
    """Return the number of blocks of a stack (``blocks`` or ``decoder_blocks``)."""
    return len({key.split(".")[1] for key in keys if key.startswith(f"{stack}.")})


def check_keys(expected: Collection[str], weights: ImportedWeights) -> None:
    """Check that no key is missing and no key is unexpected.

    Raises:
        CheckpointError: A key does not match. The error names the first one and the reason.
    """
    keys = weights.tensors
    missing = [key for key in expected if key not in keys]
    unexpected = [key for key in keys if key not in expected]
    for key in [*unexpected, *missing]:
        if block := re.match(r"(decoder_)?blocks\.\d+\.", key):
            stack = f"{block[1] or ''}blocks"
            if (depth := count_blocks(keys, stack)) != (model_depth := count_blocks(expected, stack)):
                advice = f"Set model.decoder_depth={depth}." if block[1] else _advise_size(weights)
                raise CheckpointError(f"{weights.path}: has {depth} {stack}, the model has {model_depth} ({key}). {advice}")
    if unexpected:
        part = next((part for pattern, part in UNSUPPORTED_PARTS.items() if re.search(pattern, unexpected[0])), "")
        reason = f"; a MAE has no {part}" if part else ""
        raise CheckpointError(f"{weights.path}: unexpected key {first_of(unexpected)}{reason}.")
    if missing:
        raise CheckpointError(f"{weights.path}: missing key {first_of(missing)}{_explain_missing(missing[0], weights)}.")


def _explain_missing(key: str, weights: ImportedWeights) -> str:
    if is_decoder_key(key):
        return "; a decoder must be complete or absent"
    if key.startswith("norm.") and any("fc_norm." in skipped for skipped in weights.skipped):
        return "; a classifier that was fine-tuned with mean pooling has its norm after the pooling (fc_norm)"
    if key.endswith("qkv.bias") and not any(k.endswith("qkv.bias") for k in weights.tensors if not is_decoder_key(k)):
        return "; its attention has no biases"
    return ""


def check_attention_heads(weights: ImportedWeights, heads: int, decoder_heads: int) -> None:
    """Check the numbers of attention heads, which the shapes of the tensors do not show.

    Raises:
        CheckpointError: The number is known for the weights, and differs from the model's.
    """
    found, found_decoder = weights.provenance.heads, weights.provenance.decoder_heads
    if found is not None and found != heads:
        raise CheckpointError(f"{weights.path}: has {found} attention heads, the model has {heads}. Change model.size.")
    if weights.has_decoder and found_decoder is not None and found_decoder != decoder_heads:
        raise CheckpointError(
            f"{weights.path}: the decoder has {found_decoder} attention heads, the model's decoder has {decoder_heads}. "
            f"Set model.decoder_heads={found_decoder}."
        )


def read_matching(weights: ImportedWeights, key: str, expected: Tensor) -> Tensor:
    """Return a tensor in fp32 after checking its dtype, its values, and its shape against ``expected``.

    Raises:
        CheckpointError: The shape differs, the tensor is not floating-point, or a value is not finite.
    """
    tensor = weights.tensors[key]
    if tensor.shape != expected.shape:
        shapes = f"{key} has shape {list(tensor.shape)}, the model {list(expected.shape)}"
        raise CheckpointError(f"{weights.path}: {shapes}. {_advise_shape(weights, key, tensor, expected)}")
    return to_finite_fp32(weights.path, key, tensor)


def to_finite_fp32(path: Path, key: str, tensor: Tensor) -> Tensor:
    """Return a tensor in fp32.

    Args:
        path: Where the tensor comes from, for errors.
        key: Its key, for errors.
        tensor: The tensor.

    Raises:
        CheckpointError: The tensor is not floating-point, or a value is not finite.
    """
    if not tensor.is_floating_point():
        raise CheckpointError(f"{path}: {key} has dtype {str(tensor.dtype).removeprefix('torch.')}, expected floating point.")
    tensor = tensor.float()
    if not tensor.isfinite().all():
        raise CheckpointError(f"{path}: {key} contains NaN or infinity.")
    return tensor


def _advise_size(weights: ImportedWeights) -> str:
    width, depth = weights.tensors["patch_embed.proj.weight"].shape[0], count_blocks(weights.tensors, "blocks")
    sizes = [name for name, size in SIZES.items() if (size.width, size.depth) == (width, depth)]
    return f"Set model.size={sizes[0]}." if sizes else f"No model.size has width {width} and depth {depth}."


def _advise_shape(weights: ImportedWeights, key: str, tensor: Tensor, expected: Tensor) -> str:
    """Return which config key to change so that the shape of a tensor matches."""
    if key.startswith("decoder_pred."):
        return f"Change model.{'patch_size' if tensor.shape[0] != expected.shape[0] else 'decoder_width'}."
    if is_decoder_key(key):
        if ".mlp." in key:
            return "The MLP of a decoder must be 4 times as wide as the decoder."
        return f"Set model.decoder_width={weights.tensors['decoder_norm.weight'].shape[0]}."
    if key == "patch_embed.proj.weight" and tensor.dim() == 4:
        if tensor.shape[1] != 3:
            return f"Its images have {tensor.shape[1]} {'channel' if tensor.shape[1] == 1 else 'channels'}, not 3."
        if tensor.shape[0] == expected.shape[0]:
            return f"Set model.patch_size={list(tensor.shape[2:])}."
    return _advise_size(weights)


def first_of(keys: Collection[str]) -> str:
    """Return the first key, and how many others there are: ``norm.bias (and 3 more)``."""
    return next(iter(keys)) + (f" (and {len(keys) - 1} more)" if len(keys) > 1 else "")
