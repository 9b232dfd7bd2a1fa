"""Fixed two-dimensional sine-cosine position embeddings (Vaswani et al. 2017, in the layout of MAE), and their resizing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def _sincos(coordinates_L: Tensor, dim: int) -> Tensor:
    """Embed coordinates ``[L]`` as ``[L, dim]``: all sines, then all cosines, of geometrically spaced frequencies."""
    exponents = torch.arange(dim // 2, dtype=torch.float64) / (dim / 2)
    angles = torch.outer(coordinates_L, 10000.0**-exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_pos_embed(dim: int, grid: tuple[int, int]) -> Tensor:
    """Return the position embedding of a class token and ``grid = (rows, columns)`` of patches.

    The first half of each embedding encodes the column, the second half the row. The released MAE weights were trained with
    this order. The embedding of the class token is zero.

    Returns:
        ``[1, 1 + rows * columns, dim]`` in fp32, computed in fp64.

    Raises:
        ValueError: ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a 2-D sine-cosine position embedding needs a width divisible by 4, not {dim}")
    rows, columns = grid
    row_L = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
    column_L = torch.arange(columns, dtype=torch.float64).repeat(rows)
    table = torch.cat([_sincos(column_L, dim // 2), _sincos(row_L, dim // 2)], dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), table])[None].float()


def resize_pos_embed(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resize a position embedding to another grid of patches, as MAE's fine-tuning does (He et al. 2022, appendix A.1).

    The embedding of the class token stays. The others are interpolated bicubically (``align_corners=False``, no antialiasing).
    If the grids are equal, the table is returned unchanged.

    Args:
        table: ``[1, 1 + rows * columns, D]``, class token first.
        old_grid: (rows, columns) of the table.
        new_grid: (rows, columns) of the result.

    Returns:
        ``[1, 1 + new rows * new columns, D]`` in the dtype of the table, computed in fp32.

    Raises:
        ValueError: The shape of the table does not match ``old_grid``.
    """
    rows, columns = old_grid
    if table.dim() != 3 or table.shape[:2] != (1, 1 + rows * columns):
        raise ValueError(
            f"a position embedding of shape {list(table.shape)} does not match {rows} x {columns} patches and a class token"
        )
    if old_grid == new_grid:
        return table
    plane = table[:, 1:].float().reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
    plane = functional.interpolate(plane, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], plane.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)
