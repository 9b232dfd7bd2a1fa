"""The learning target: the pixels of each patch, plain or normalized by the patch's own mean and standard deviation.

Shapes: B images, H x W pixels, L patches, P = 3 * patch_h * patch_w values per patch (in row, column, channel order).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Target = Literal["norm_pixel", "pixel"]
EPS = 1e-6  # added to the variance of a patch, as in the reference


def patchify(images_B3HW: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut images ``[B, 3, H, W]`` into patches ``[B, L, P]``."""
    b, c, h, w = images_B3HW.shape
    ph, pw = patch_size
    x = images_B3HW.reshape(b, c, h // ph, ph, w // pw, pw)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // ph) * (w // pw), ph * pw * c)


def unpatchify(patches_BLP: Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Invert :func:`patchify`. ``grid`` is (rows, columns) of patches. Returns ``[B, 3, H, W]``."""
    (ph, pw), (rows, columns) = patch_size, grid
    b = patches_BLP.shape[0]
    x = patches_BLP.reshape(b, rows, columns, ph, pw, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, rows * ph, columns * pw)


def patch_statistics(patches_BLP: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation ``sqrt(var + 1e-6)`` of each patch, ``[B, L, 1]`` in fp32.

    The variance is unbiased, as in the reference.
    """
    patches = patches_BLP.float()
    var, mean = patches.var(dim=-1, keepdim=True), patches.mean(dim=-1, keepdim=True)
    return mean, (var + EPS).sqrt()


def compute_target(images_B3HW: Tensor, patch_size: tuple[int, int], target: Target) -> Tensor:
    """Return the regression target ``[B, L, P]`` in fp32."""
    patches = patchify(images_B3HW.float(), patch_size)
    if target == "pixel":
        return patches
    mean, std = patch_statistics(patches)
    return (patches - mean) / std


def prediction_to_pixels(pred_BLP: Tensor, images_B3HW: Tensor, patch_size: tuple[int, int], target: Target) -> Tensor:
    """Convert predicted patches to pixel values of normalized images, ``[B, L, P]``.

    A ``norm_pixel`` prediction has no brightness and contrast of its own. It gets those of the true patch, which the model
    never saw. State this next to every picture made this way.
    """
    if target == "pixel":
        return pred_BLP.float()
    mean, std = patch_statistics(patchify(images_B3HW.float(), patch_size))
    return pred_BLP.float() * std + mean
