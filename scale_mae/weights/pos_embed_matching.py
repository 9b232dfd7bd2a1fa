"""Matches the position embeddings of imported weights to a model with another grid of patches.

A fixed sine-cosine embedding is recomputed, so that it is exact. A learned embedding is kept. Both are interpolated if the
grid differs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.model.pos_embed import resize_pos_embed, sincos_pos_embed
from scale_mae.weights.key_matching import to_finite_fp32
from scale_mae.weights.weight_import import ImportedWeights

Grid = tuple[int, int]  # rows and columns of patches
# Largest difference between a sine-cosine embedding and the exact one, by the dtype in which it was stored. In 16 bits the
# difference comes from rounding, in fp32 from the order of the computation.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-4}


def infer_grid(weights: ImportedWeights, model_grid: Grid | None = None) -> Grid:
    """Return the grid of patches that the position embedding was made for.

    Args:
        weights: Weights with ``pos_embed`` and ``patch_embed.proj.weight``.
        model_grid: The grid to assume if the image size is unknown and the number of patches is not a square.

    Raises:
        CheckpointError: The grid is unknown.
    """
    pos_embed, patch = weights.tensors["pos_embed"], weights.tensors["patch_embed.proj.weight"].shape[2:]
    patches = pos_embed.shape[1] - 1 if pos_embed.dim() == 3 and pos_embed.shape[0] == 1 else 0
    side = math.isqrt(max(0, patches))
    candidates = [(side, side), *([model_grid] if model_grid else [])]
    if weights.provenance.image_size:
        height, width = weights.provenance.image_size
        candidates.insert(0, (height // patch[0], width // patch[1]))
    possible = [grid for grid in candidates if patches and grid[0] * grid[1] == patches]
    if not possible:
        raise CheckpointError(f"{weights.path}: pos_embed has shape {list(pos_embed.shape)}; its grid of patches is unknown.")
    return next((grid for grid in possible if is_sincos_pos_embed(pos_embed, grid)), possible[0])


def is_sincos_pos_embed(pos_embed: Tensor, grid: Grid) -> bool:
    """Return whether an embedding is the sine-cosine one of a grid, apart from the rounding of a dtype."""
    if pos_embed.shape[2] % 4:
        return False
    exact, pos_embed = sincos_pos_embed(pos_embed.shape[2], grid), pos_embed.float()
    if exact.shape != pos_embed.shape:
        return False
    difference = float((pos_embed - exact).abs().max())
    return any(difference <= limit and torch.equal(pos_embed.to(dtype).float(), pos_embed) for dtype, limit in ROUNDING.items())


def fit_pos_embed(
    weights: ImportedWeights, key: str, expected: Tensor, *, source_grid: Grid, model_grid: Grid
) -> tuple[Tensor, list[str]]:
    """Return a position embedding for the model.

    Args:
        weights: The weights that contain the embedding.
        key: ``pos_embed`` or ``decoder_pos_embed``.
        expected: The model's own embedding.
        source_grid: The grid of the weights.
        model_grid: The grid of the model.

    Returns:
        The embedding in fp32, and notes for the log if it is learned or interpolated.

    Raises:
        CheckpointError: The width or the number of patches differs from that of the other tensors.
    """
    pos_embed, patches = weights.tensors[key], f"{source_grid[0]} x {source_grid[1]}"
    if pos_embed.shape != (1, 1 + source_grid[0] * source_grid[1], expected.shape[2]):
        raise CheckpointError(
            f"{weights.path}: {key} has shape {list(pos_embed.shape)}, "
            f"which does not match {patches} patches of width {expected.shape[2]}."
        )
    values, notes = to_finite_fp32(weights.path, key, pos_embed), []
    if is_sincos_pos_embed(pos_embed, source_grid):
        values = sincos_pos_embed(pos_embed.shape[2], source_grid)
    else:
        notes.append(f"{key} is learned, so it is kept and not trained.")
    if source_grid != model_grid:
        notes.append(f"Interpolated {key} from {patches} to {model_grid[0]} x {model_grid[1]} patches.")
    return resize_pos_embed(values, source_grid, model_grid), notes
