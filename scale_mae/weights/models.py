"""Trained weights as models in Python: the whole MAE, or its encoder as a timm model, from a checkpoint or an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from scale_mae.checkpoint.safetensors_io import TensorFiles
from scale_mae.checkpoint.store import DEEPSPEED_TAG, CheckpointError, read_config
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.config import Config, UserError
from scale_mae.model.mae import MAE, build_mae
from scale_mae.weights.metadata import METADATA_KEY, is_classifier, pretrained_cfg


def model_from_config(config: Config, seed: int | None = None) -> MAE:
    """The model of a run, freshly initialised from ``seed`` (default: the run's own)."""
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


def load_mae(checkpoint: Path) -> MAE:
    """The whole model, decoder included, with a checkpoint's fp32 weights, on the host, in evaluation mode.

    Raises:
        CheckpointError: a classifier's, or a tensor is missing, superfluous or misshapen.
    """
    config = read_config(checkpoint)
    if is_classifier(config):
        raise CheckpointError(f"{checkpoint}: a classifier (run.task={config.run.task}), not a MAE; it has no decoder")
    with torch.device("meta"):
        model = model_from_config(config)
    weights = dict(ZeroReader(checkpoint / DEEPSPEED_TAG))
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint}: does not fit its config ({' '.join(str(error).split())})") from None
    return model.eval()


def encoder_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of a MAE's state, under timm's names (which are the same)."""
    return {n: t for n, t in weights.items() if not n.startswith("decoder_") and n != "mask_token"}


def build_encoder(facts: dict[str, Any]) -> VisionTransformer:
    """An empty timm model for weights; ``pretrained_cfg`` holds image size, mean and deviation."""
    account = {name: tuple(v) if isinstance(v, list) else v for name, v in pretrained_cfg(facts).items()}
    encoder = timm.create_model(facts["timm_name"], pretrained=False, pretrained_cfg=account, **facts["timm_kwargs"])
    assert isinstance(encoder, VisionTransformer)
    for module in encoder.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = facts["layer_norm_eps"]
    return encoder.eval()


def read_export(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors export, a file or a folder.

    Raises:
        UserError: no such file, or not one of ours.
    """
    files = TensorFiles(path)
    if METADATA_KEY not in files.metadata:
        raise UserError(f"{path}: not written by scale-mae convert (no {METADATA_KEY} metadata)")
    return json.loads(files.metadata[METADATA_KEY]), dict(files)
