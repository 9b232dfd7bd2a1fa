"""Draws reconstructions of a masked autoencoder: masked image | reconstruction | original."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from scale_mae.config import Config, UserError
from scale_mae.data.errors import ImageError
from scale_mae.data.pillow import center_square, decode, read_image_header
from scale_mae.data.sample_plan import SamplePlan
from scale_mae.data.transforms import denormalize, normalize
from scale_mae.model.mae import MAE
from scale_mae.model.targets import patchify, prediction_to_pixels, unpatchify

GRAY = 0.5  # color of a hidden patch


@torch.inference_mode()
def reconstruct(model: MAE, images_B3HW: Tensor, noise_BL: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Replace hidden patches by the model's prediction.

    Args:
        model: A model with its decoder.
        images_B3HW: Normalized images.
        noise_BL: The noise that determines the mask.
        mask_ratio: The share of hidden patches.

    Returns:
        The normalized images with predicted patches, ``[B, 3, H, W]``, and the mask in pixels, ``[B, 1, H, W]``; 1 is hidden.
    """
    output = model(images_B3HW, noise_BL, mask_ratio)
    predicted = prediction_to_pixels(output.pred, images_B3HW, model.patch_size, model.target)
    mask_BL1 = output.mask[..., None]
    patches = patchify(images_B3HW, model.patch_size) * (1 - mask_BL1) + predicted * mask_BL1
    mask = unpatchify(mask_BL1.expand(-1, -1, model.patch_size[0] * model.patch_size[1]), model.patch_size, model.grid)
    return unpatchify(patches, model.patch_size, model.grid), mask


def draw_reconstructions(
    model: MAE, config: Config, paths: Sequence[str], out: str | Path, mask_ratios: Sequence[float], step: int
) -> Path:
    """Write a picture with one row per image and mask ratio: masked image | reconstruction | original.

    Args:
        model: A trained model with its decoder.
        config: The run's configuration: its mean, standard deviation and seed are used.
        paths: Image files.
        out: The picture to write.
        mask_ratios: Shares of hidden patches.
        step: The training step, for the title.

    Returns:
        ``out``.

    Raises:
        UserError: An image cannot be read, a ratio hides all patches or none, or ``out`` cannot be written.
    """
    mean, std = config.data.mean, config.data.std
    raw = torch.stack([_load(path, model.image_size) for path in paths])
    images = normalize(raw, mean, std)
    noise = torch.from_numpy(SamplePlan(config.run.seed, 1, 1).mask_noise(np.arange(len(paths)), model.num_patches))
    rows: list[tuple[str, Sequence[Tensor]]] = []
    by_ratio = []
    for ratio in mask_ratios:
        try:
            filled, mask = reconstruct(model, images, noise, ratio)
        except ValueError as error:
            raise UserError(f"--mask-ratio: {error}") from None
        original = denormalize(images, mean, std)
        by_ratio.append((original * (1 - mask) + GRAY * mask, denormalize(filled, mean, std), original))
    for i, path in enumerate(paths):
        for ratio, pictures in zip(mask_ratios, by_ratio, strict=True):
            rows.append((f"{Path(path).name}\n{ratio:.0%} hidden", [p[i] for p in pictures]))
    how = (
        "predicted patches are normalized; the picture uses the mean and standard deviation of the true patch"
        if model.target == "norm_pixel"
        else "predicted pixels"
    )
    _plot(rows, f"step {step}: {how}", Path(out))
    return Path(out)


def _load(path: str, size: tuple[int, int]) -> Tensor:
    try:
        data = Path(path).read_bytes()
        header = read_image_header(data, verify=False)
        return torch.from_numpy(decode(data, center_square(header.width, header.height), size).copy())
    except (OSError, ImageError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error})") from None


def _plot(rows: Sequence[tuple[str, Sequence[Tensor]]], title: str, out: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = ("masked", "reconstruction", "original")
    figure, axes = pyplot.subplots(len(rows), 3, figsize=(6.6, 2.0 * len(rows) + 0.8), squeeze=False, layout="constrained")
    for row, (label, pictures) in zip(axes, rows, strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(name, fontsize=10)
    figure.suptitle(title, fontsize=9)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=120, format="png")
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: cannot be written ({error})") from None
    finally:
        pyplot.close(figure)
