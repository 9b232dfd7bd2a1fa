"""Random masking: which patches the encoder sees. The noise that decides is an argument, never drawn here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Masking(NamedTuple):
    """``ids_keep`` ``[B, K]``, ``ids_restore`` ``[B, L]`` (inverse of the shuffle), ``mask`` ``[B, L]`` (1 = removed)."""

    ids_keep: Tensor
    ids_restore: Tensor
    mask: Tensor


def num_visible_patches(patches: int, mask_ratio: float) -> int:
    """Number of visible patches, rounded down as in the paper (49 of 196 and 64 of 256 at 0.75)."""
    return int(patches * (1 - mask_ratio))


def random_masking(noise_BL: Tensor, keep: int) -> Masking:
    """Keep the ``keep`` patches with the smallest noise of each image (He et al. 2022, section 3)."""
    ids_shuffle = noise_BL.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = (ids_restore >= keep).to(torch.float32)
    return Masking(ids_shuffle[:, :keep], ids_restore, mask)
