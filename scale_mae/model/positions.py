"""Fixed two-dimensional sine-cosine position tables (Vaswani et al. 2017, as MAE lays them out)."""

from __future__ import annotations

import torch
from torch import Tensor


def _sincos(positions_L: Tensor, dim: int) -> Tensor:
    """``[L]`` coordinates to ``[L, dim]``: all sines, then all cosines, of geometrically spaced frequencies."""
    exponents = torch.arange(dim // 2, dtype=torch.float64) / (dim / 2)
    angles = torch.outer(positions_L, 10000.0**-exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_table(dim: int, grid: tuple[int, int]) -> Tensor:
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
