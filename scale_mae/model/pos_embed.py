"""Fixed two-dimensional sine-cosine position tables (Vaswani et al. 2017, as MAE lays them out)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def _sincos(positions_L: Tensor, dim: int) -> Tensor:
    """``[L]`` coordinates to ``[L, dim]``: all sines, then all cosines, of geometrically spaced frequencies."""
    exponents = torch.arange(dim // 2, dtype=torch.float64) / (dim / 2)
    angles = torch.outer(positions_L, 10000.0**-exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_pos_embed(dim: int, grid: tuple[int, int]) -> Tensor:
    """Position table for a class token and ``grid = (rows, columns)`` of patches.

    The first half of each row encodes the column, the second half the row: the order that released MAE weights were
    trained with. The class token's row is zero.

    Returns:
        ``[1, 1 + rows * columns, dim]`` in fp32, computed in fp64.

    Raises:
        ValueError: ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a 2-D sine-cosine table needs a width divisible by 4, not {dim}")
    rows, columns = grid
    row_L = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
    column_L = torch.arange(columns, dtype=torch.float64).repeat(rows)
    table = torch.cat([_sincos(column_L, dim // 2), _sincos(row_L, dim // 2)], dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), table])[None].float()


def resize_pos_embed(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """A position table for another grid of patches, as MAE's fine-tuning does it (He et al. 2022, appendix A.1).

    The class token's row stays; the others, laid out as ``old_grid = (rows, columns)``, are interpolated bicubically
    (corners not aligned, no antialiasing). Equal grids give the table itself, unchanged to the bit.

    Args:
        table: ``[1, 1 + rows * columns, D]``, class token first.
        old_grid: rows and columns of the table.
        new_grid: rows and columns wanted.

    Returns:
        ``[1, 1 + new rows * new columns, D]`` in the table's dtype, computed in fp32.

    Raises:
        ValueError: the table does not have the rows of ``old_grid``.
    """
    rows, columns = old_grid
    if table.dim() != 3 or table.shape[:2] != (1, 1 + rows * columns):
        raise ValueError(f"a table of shape {list(table.shape)} is not one for {rows} x {columns} patches and a class token")
    if old_grid == new_grid:
        return table
    plane = table[:, 1:].float().reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
    plane = functional.interpolate(plane, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], plane.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)
