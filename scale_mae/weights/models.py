"""Trained weights as models in Python: the whole MAE, or its encoder as a timm model, from a checkpoint or an export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from scale_mae.checkpoint.safetensors_io import TensorFiles
from scale_mae.checkpoint.store import CheckpointError, read_config
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.config.loading import Config, UserError
from scale_mae.engine import TAG
from scale_mae.model.mae import MAE, build_mae
from scale_mae.weights.metadata import METADATA_KEY, is_classifier, pretrained_cfg


def model_from_config(config: Config, seed: int | None = None) -> MAE:
    """The model of a run, freshly initialised from ``seed`` (default: the run's own)."""
    m = config.model
    return build_mae(
        m.size,
        image_size=m.image_size,
        patch=m.patch,
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
    weights = dict(ZeroReader(checkpoint / TAG))
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


def load_encoder(path: str | Path, warn: Callable[[str], None] = print) -> VisionTransformer:
    """A trained encoder as a timm model in evaluation mode.

    Args:
        path: weights in a format that ``scale-mae convert`` writes (but for programs: ``onnx``, ``torch_export``), a run
            directory, a checkpoint, or a file or folder of the reference, timm or Hugging Face.
        warn: told of damaged checkpoints that were passed over.

    Returns:
        A timm VisionTransformer without head; ``forward_features(images)`` gives ``[B, 1 + L, D]``, class token first,
        after the final norm, unless it was exported with ``--pool avg``: then ``fc_norm`` has that part.
        ``pretrained_cfg`` holds the image size, mean and deviation it was trained with.

    Raises:
        UserError: nothing usable there.
    """
    from scale_mae.weights.initialization import read_encoder  # it builds on this module

    facts, weights = read_encoder(Path(path), warn)
    encoder = build_encoder(facts)
    encoder.load_state_dict(weights, strict=True)
    return encoder


def untrained_encoder(path: str | Path, warn: Callable[[str], None] = print) -> VisionTransformer:
    """The encoder of :func:`load_encoder` with the weights that its run began with.

    Raises:
        UserError: its run is not known or trained a classifier, or ``model.init_from`` is not there any more.
    """
    from scale_mae.weights.initialization import initial_model, read_encoder  # they build on this module

    facts, _ = read_encoder(Path(path), warn)
    if "config" not in facts:
        raise UserError(f"{path}: the weights that it began with are not known, since scale_mae did not train it")
    if "task" in facts:
        began = facts["config"]["model"]["init_from"]
        advice = f"measure those that it began with, {began}, beside it" if began else "it began with random ones"
        raise UserError(f"{path}: a classifier, whose encoder has no untrained weights of its own; {advice}")
    tree = facts["config"] | {"model": facts["config"]["model"] | {"image_size": facts["image_size"]}}
    try:
        config = Config.model_validate(tree)
    except ValueError:
        raise CheckpointError(f"{path}: what it says of itself is damaged (its config)") from None
    model, _ = initial_model(config, warn)
    encoder = build_encoder(facts)
    encoder.load_state_dict(encoder_weights(model.state_dict()), strict=True)
    return encoder


def read_export(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors export, a file or a folder.

    Raises:
        UserError: no such file, or not one of ours.
    """
    files = TensorFiles(path)
    if METADATA_KEY not in files.metadata:
        raise UserError(f"{path}: not written by scale-mae convert (no {METADATA_KEY} metadata)")
    return json.loads(files.metadata[METADATA_KEY]), dict(files)
