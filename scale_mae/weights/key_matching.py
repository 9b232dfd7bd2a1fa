"""Whether weights fit a model, strictly, and if not: which tensor, which shapes, and the key to change."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from scale_mae.checkpoint.store import CheckpointError
from scale_mae.model.pos_embed import resize_pos_embed, sincos_pos_embed
from scale_mae.model.sizes import SIZES
from scale_mae.weights.importing import Weights, is_decoder

# parts of other ViTs, by the names of their tensors, that a MAE has no counterpart of
STRANGE = {
    r"\.(ls\d|gamma_\d|layer_scale\w*)": "layer scale",
    r"reg_token|register": "register tokens",
    r"[qk]_norm": "normalised queries and keys",
    r"dist_token|head_dist|distillation": "a distillation token",
    r"norm_pre|pre_norm": "a norm before the blocks",
    r"rel_pos|relative_position|rope": "relative positions",
    r"attn_pool": "attention pooling",
    r"\.mlp\.(w\d|fc1_|gate|norm)": "a gated MLP",
}
# A table of sines and cosines that went through a dtype differs by its rounding; fp32 ones by how they were computed.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-4}


def depth(names: Collection[str], blocks: str) -> int:
    """Number of blocks called ``blocks.0`` and so on."""
    return len({name.split(".")[1] for name in names if name.startswith(f"{blocks}.")})


def check_names(wanted: Collection[str], weights: Weights) -> None:
    """No tensor may be missing, none superfluous.

    Raises:
        CheckpointError: names the first one and says why.
    """
    have = weights.tensors
    missing = [name for name in wanted if name not in have]
    superfluous = [name for name in have if name not in wanted]
    for name in [*superfluous, *missing]:
        if block := re.match(r"(decoder_)?blocks\.\d+\.", name):
            stack = f"{block[1] or ''}blocks"
            if (theirs := depth(have, stack)) != (ours := depth(wanted, stack)):
                advice = f"set model.decoder_depth={theirs}" if block[1] else _size_advice(weights)
                raise CheckpointError(f"{weights.path}: has {theirs} {stack}, the model {ours} ({name}): {advice}")
    if superfluous:
        name = superfluous[0]
        why = next((f": {part}" for pattern, part in STRANGE.items() if re.search(pattern, name)), "")
        raise CheckpointError(f"{weights.path}: {name}{more(superfluous)} has no place in a MAE{why}")
    if missing:
        name, why = missing[0], ""
        if is_decoder(name):
            why = "; of a decoder all or nothing has to be there"
        elif name.startswith("norm.") and any("fc_norm." in left for left in weights.left_out):
            why = "; it was fine-tuned with mean pooling, which has its norm behind the pooling (fc_norm)"
        elif name.endswith("qkv.bias") and not any(own.endswith("qkv.bias") for own in have if not is_decoder(own)):
            why = "; its attention has no biases"
        raise CheckpointError(f"{weights.path}: {name}{more(missing)} is missing{why}")


def check_heads(weights: Weights, heads: int, decoder_heads: int) -> None:
    """Attention heads, the only size that shapes do not show.

    Raises:
        CheckpointError: where the file says, and they differ.
    """
    told, decoder_told = weights.origin.heads, weights.origin.decoder_heads
    if told is not None and told != heads:
        raise CheckpointError(f"{weights.path}: has {told} attention heads, the model {heads}: change model.size")
    if weights.has_decoder and decoder_told is not None and decoder_told != decoder_heads:
        advice = f"set model.decoder_heads={decoder_told}"
        raise CheckpointError(
            f"{weights.path}: its decoder has {decoder_told} attention heads, the model {decoder_heads}: {advice}"
        )


def checked(weights: Weights, name: str, wanted: Tensor) -> Tensor:
    """A tensor of floating-point numbers in fp32, of the shape of ``wanted`` and finite.

    Raises:
        CheckpointError: it is not; both shapes and the key to change.
    """
    found = weights.tensors[name]
    if found.shape != wanted.shape:
        advice = _advice(weights, name, found, wanted)
        raise CheckpointError(f"{weights.path}: {name} has shape {list(found.shape)}, the model {list(wanted.shape)}: {advice}")
    return in_fp32(weights.path, name, found)


def in_fp32(path: Path, name: str, found: Tensor) -> Tensor:
    """A tensor that was found at ``path``, in fp32.

    Raises:
        CheckpointError: it does not hold floating-point numbers, or some of them are not finite.
    """
    if not found.is_floating_point():
        raise CheckpointError(f"{path}: {name} holds {str(found.dtype).removeprefix('torch.')}, not weights")
    found = found.float()
    if not found.isfinite().all():
        raise CheckpointError(f"{path}: {name} holds values that are not finite")
    return found


def _size_advice(weights: Weights) -> str:
    width, blocks = weights.tensors["patch_embed.proj.weight"].shape[0], depth(weights.tensors, "blocks")
    fitting = [name for name, size in SIZES.items() if (size.width, size.depth) == (width, blocks)]
    return f"set model.size={fitting[0]}" if fitting else f"no model.size has width {width} and depth {blocks}"


def _advice(weights: Weights, name: str, found: Tensor, wanted: Tensor) -> str:
    """Which key to change so that a tensor fits."""
    if name.startswith("decoder_pred."):
        return "change model.patch_size" if found.shape[0] != wanted.shape[0] else "change model.decoder_width"
    if is_decoder(name):
        if ".mlp." in name:
            return "its decoder's MLP is not 4 times as wide as the decoder"
        return f"set model.decoder_width={weights.tensors['decoder_norm.weight'].shape[0]}"
    if name == "patch_embed.proj.weight" and found.dim() == 4:
        if found.shape[1] != 3:
            return f"it takes images of {found.shape[1]} channels"
        if found.shape[0] == wanted.shape[0]:
            return f"set model.patch_size={list(found.shape[2:])}"
    return _size_advice(weights)


def more(names: Collection[str]) -> str:
    """How many there are beside the first."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


# ---------------------------------------------------------------- position tables


def grid_of(weights: Weights, wanted: tuple[int, int] | None = None) -> tuple[int, int]:
    """Rows and columns of patches that the position table of some weights was made for.

    Args:
        weights: with ``pos_embed`` and ``patch_embed.proj.weight``.
        wanted: a guess where nothing says and the patches make no square.

    Raises:
        CheckpointError: it cannot be told.
    """
    table, patch = weights.tensors["pos_embed"], weights.tensors["patch_embed.proj.weight"].shape[2:]
    patches = table.shape[1] - 1 if table.dim() == 3 and table.shape[0] == 1 else 0
    side = math.isqrt(max(0, patches))
    candidates = [(side, side), *([wanted] if wanted else [])]
    if weights.origin.image_size:
        height, width = weights.origin.image_size
        candidates.insert(0, (height // patch[0], width // patch[1]))
    fitting = [grid for grid in candidates if patches and grid[0] * grid[1] == patches]
    if not fitting:
        told = f"pos_embed has shape {list(table.shape)}, from which rows and columns of patches cannot be told"
        raise CheckpointError(f"{weights.path}: {told}")
    return next((grid for grid in fitting if is_sincos(table, grid)), fitting[0])


def is_sincos(table: Tensor, grid: tuple[int, int]) -> bool:
    """Whether a table is the fixed one of this grid, but for the rounding of the dtype that it went through."""
    if table.shape[2] % 4:
        return False
    exact, table = sincos_pos_embed(table.shape[2], grid), table.float()
    if exact.shape != table.shape:
        return False
    difference = float((table - exact).abs().max())
    return any(difference <= most and torch.equal(table.to(dtype).float(), table) for dtype, most in ROUNDING.items())


def fit_table(weights: Weights, name: str, wanted: Tensor, grids: Mapping[str, tuple[int, int]]) -> tuple[Tensor, list[str]]:
    """A position table for the model: exact where the file has the fixed one, interpolated for another grid of patches.

    Args:
        weights: hold it.
        name: ``pos_embed`` or ``decoder_pos_embed``.
        wanted: the model's own.
        grids: rows and columns of the file and of the model, as ``old`` and ``new``.

    Returns:
        The table in fp32, and what has to be said of it.

    Raises:
        CheckpointError: of another width or number of patches than the other tensors.
    """
    table, old, new = weights.tensors[name], grids["old"], grids["new"]
    if table.shape != (1, 1 + old[0] * old[1], wanted.shape[2]):
        raise CheckpointError(
            f"{weights.path}: {name} has shape {list(table.shape)}, which does not fit {old[0]} x {old[1]} patches "
            f"of width {wanted.shape[2]}"
        )
    values, told = in_fp32(weights.path, name, table), []
    if is_sincos(table, old):
        values = sincos_pos_embed(table.shape[2], old)
    else:
        told.append(f"its {name} is not the sine-cosine one: kept, and not trained")
    if old != new:
        told.append(f"{name} interpolated from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches")
    return resize_pos_embed(values, old, new), told
