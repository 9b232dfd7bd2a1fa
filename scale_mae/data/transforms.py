"""Color jitter, normalization, and its inverse. They run on the device of the images."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)  # weights of red, green and blue in gray (ITU-R BT.601), as in torchvision


def normalize(
    images_BHW3: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float], jitter_B6: Tensor | None = None
) -> Tensor:
    """Normalize images, after color jitter if ``jitter_B6`` is given.

    Args:
        images_BHW3: uint8.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel, for pixels in [0, 1].
        jitter_B6: From :meth:`SamplePlan.color_jitter`.

    Returns:
        fp32 ``[B, 3, H, W]``.
    """
    if jitter_B6 is not None:
        mean_1311, std_1311 = _statistics(mean, std, images_BHW3.device)
        return (color_jitter(images_BHW3.permute(0, 3, 1, 2).float() / 255, jitter_B6) - mean_1311) / std_1311
    # Work on whole rows in place: on a CPU this is four times as fast as broadcasting over three channels.
    scale_W3, shift_W3 = _row_statistics(mean, std, images_BHW3.shape[2], images_BHW3.device)
    rows_BHW3 = images_BHW3.flatten(2).float().mul_(scale_W3).add_(shift_W3)
    return rows_BHW3.view(images_BHW3.shape).permute(0, 3, 1, 2)


def color_jitter(pixels_B3HW: Tensor, jitter_B6: Tensor) -> Tensor:
    """Change brightness, contrast and saturation as torchvision's ColorJitter does. Each image has its own factors and order.

    Args:
        pixels_B3HW: In [0, 1].
        jitter_B6: From :meth:`SamplePlan.color_jitter`: three factors, and three numbers that sort the three changes.
    """
    luma_1311, _ = _statistics(LUMA, LUMA, pixels_B3HW.device)
    factors_B3, order_B3 = jitter_B6[:, :3], jitter_B6[:, 3:].argsort(dim=1)
    for turn in range(3):
        which_B111 = order_B3[:, turn].view(-1, 1, 1, 1)
        factor_B111 = factors_B3.gather(1, order_B3[:, turn : turn + 1]).view(-1, 1, 1, 1)
        gray_B1HW = (pixels_B3HW * luma_1311).sum(dim=1, keepdim=True)
        mean_B111 = gray_B1HW.mean(dim=(2, 3), keepdim=True)
        # blend with black (0, brightness), with the mean gray (1, contrast) or with the gray image (2, saturation)
        other = torch.where(which_B111 == 2, gray_B1HW, torch.where(which_B111 == 1, mean_B111, 0.0))
        pixels_B3HW = (pixels_B3HW * factor_B111 + other * (1 - factor_B111)).clamp(0, 1)
    return pixels_B3HW


def denormalize(images_B3HW: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """Invert :func:`normalize` up to rounding. Returns values clipped to [0, 1], ``[B, 3, H, W]``."""
    mean_1311, std_1311 = _statistics(mean, std, images_B3HW.device)
    return (images_B3HW * std_1311 + mean_1311).clamp(0, 1)


@functools.lru_cache
def _statistics(
    mean: tuple[float, float, float], std: tuple[float, float, float], device: torch.device
) -> tuple[Tensor, Tensor]:
    # cached, because copying to a GPU waits for the GPU
    return torch.tensor(mean, device=device).view(1, 3, 1, 1), torch.tensor(std, device=device).view(1, 3, 1, 1)


@functools.lru_cache
def _row_statistics(
    mean: tuple[float, float, float], std: tuple[float, float, float], width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return scale and shift for the ``3 * width`` values of a row of uint8 pixels."""
    mean_3, std_3 = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    scale, shift = 1 / (255 * std_3), -mean_3 / std_3
    return scale.float().repeat(width).to(device), shift.float().repeat(width).to(device)
