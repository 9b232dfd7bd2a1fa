"""Builds models from a configuration or from export metadata: the whole MAE, or its encoder as a timm model."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from scale_mae.config import Config
from scale_mae.model.mae import MAE, build_mae
from scale_mae.weights.metadata import build_pretrained_cfg


def build_mae_from_config(config: Config, seed: int | None = None) -> MAE:
    """Build the MAE of a run with random weights.

    Args:
        config: The configuration of the run.
        seed: Seed of the random weights. The default is ``run.seed``.
    """
    m = config.model
    return build_mae(
        m.size,
        image_size=m.image_size,
        patch_size=m.patch,
        seed=config.run.seed if seed is None else seed,
        mask_ratio=m.mask_ratio,
        target=m.target,
        decoder_width=m.decoder_width,
        decoder_depth=m.decoder_depth,
        decoder_heads=m.decoder_heads,
    )


def build_meta_mae(config: Config) -> MAE:
    """Build the MAE of a run on the meta device, where its weights take no memory, in evaluation mode."""
    with torch.device("meta"):
        return build_mae_from_config(config).eval()


def build_encoder(metadata: dict[str, Any]) -> VisionTransformer:
    """Build the timm model that export metadata describes, in evaluation mode.

    The weights are random. ``pretrained_cfg`` contains the image size and the channel means and deviations.
    """
    pretrained_cfg = {name: tuple(v) if isinstance(v, list) else v for name, v in build_pretrained_cfg(metadata).items()}
    encoder = timm.create_model(
        metadata["timm_name"], pretrained=False, pretrained_cfg=pretrained_cfg, **metadata["timm_kwargs"]
    )
    assert isinstance(encoder, VisionTransformer)
    for module in encoder.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = metadata["layer_norm_eps"]
    return encoder.eval()


def encoder_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder's tensors of a MAE's state dict. Their keys are the same in timm."""
    return {n: t for n, t in state.items() if not n.startswith("decoder_") and n != "mask_token"}
