"""Random masking: selects the patches that the encoder sees. The random numbers are an argument and are never drawn here.

To add a mask strategy, add a function that returns a :class:`Masking`, and call it in :meth:`scale_mae.model.mae.MAE.forward`.
A strategy that users select needs a key in ``config/schema.py``.
The sample plan draws the noise: :meth:`scale_mae.data.sample_plan.SamplePlan.mask_noise`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Masking(NamedTuple):
    """The visible patches.

    Attributes:
        ids_keep: Indices of the visible patches in random order, ``[B, K]``.
        ids_restore: The inverse of the shuffle, ``[B, L]``.
        mask: 1 = removed, 0 = visible, fp32 ``[B, L]``.
    """

    ids_keep: Tensor
    ids_restore: Tensor
    mask: Tensor


def num_visible_patches(num_patches: int, mask_ratio: float) -> int:
    """Return the number of visible patches, rounded down as in the paper: 49 of 196 and 64 of 256 at ratio 0.75."""
    return int(num_patches * (1 - mask_ratio))


def random_masking(noise_BL: Tensor, keep: int) -> Masking:
    """Keep the ``keep`` patches with the smallest noise in each image (He et al. 2022, section 3)."""
    ids_shuffle = noise_BL.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = (ids_restore >= keep).to(torch.float32)
    return Masking(ids_shuffle[:, :keep], ids_restore, mask)
