"""Loads trained weights as models: an encoder as a timm model, or the whole MAE."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from timm.models.vision_transformer import VisionTransformer

from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.checkpoint.manifest import read_config
from scale_mae.checkpoint.paths import DEEPSPEED_TAG
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.config import Config, UserError
from scale_mae.model.mae import MAE
from scale_mae.weights.encoder_import import import_encoder
from scale_mae.weights.initialization import load_initial_model
from scale_mae.weights.metadata import is_classifier
from scale_mae.weights.model_builder import build_encoder, build_meta_mae, encoder_state


def load_encoder(path: str | Path, warn: Callable[[str], None] = print) -> VisionTransformer:
    """Load a trained encoder as a timm model in evaluation mode.

    Args:
        path: A run directory, a checkpoint, an export (all formats except ``onnx`` and ``torch_export``), or a file or folder
            of the reference repository, timm or Hugging Face.
        warn: Receives one message for each damaged checkpoint that was skipped.

    Returns:
        A timm ``VisionTransformer`` without head. ``forward_features(images)`` returns ``[B, 1 + L, D]``, the class token
        first, after the final norm. If the export has ``--pool avg``, the norm is ``fc_norm`` and follows the pooling.
        ``pretrained_cfg`` contains the image size, mean and standard deviation of training.

    Raises:
        UserError: ``path`` contains no usable weights.
    """
    metadata, weights = import_encoder(Path(path), warn)
    encoder = build_encoder(metadata)
    encoder.load_state_dict(weights, strict=True)
    return encoder


def load_untrained_encoder(path: str | Path, warn: Callable[[str], None] = print) -> VisionTransformer:
    """Load the encoder of :func:`load_encoder` with the weights that it had before training.

    Raises:
        UserError: ``path`` contains third-party weights or a classifier, or ``model.init_from`` does not exist any more.
    """
    metadata, _ = import_encoder(Path(path), warn)
    if "config" not in metadata:
        raise UserError(f"{path}: the initial weights are unknown, because scale_mae did not train this encoder.")
    if "task" in metadata:
        source = metadata["config"]["model"]["init_from"]
        advice = f"Evaluate {source}, from which it was initialized, instead" if source else "It was initialized randomly"
        raise UserError(f"{path}: a classifier; the untrained weights of its encoder are not stored. {advice}.")
    tree = metadata["config"] | {"model": metadata["config"]["model"] | {"image_size": metadata["image_size"]}}
    try:
        config = Config.model_validate(tree)
    except ValueError:
        raise CheckpointError(f"{path}: the metadata is damaged (config).") from None
    model, _ = load_initial_model(config, warn)
    encoder = build_encoder(metadata)
    encoder.load_state_dict(encoder_state(model.state_dict()), strict=True)
    return encoder


def load_mae(checkpoint: Path) -> MAE:
    """Load the whole MAE, decoder included, with a checkpoint's fp32 weights, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: The checkpoint is a classifier's, or a tensor is missing, unexpected or of another shape.
    """
    config = read_config(checkpoint)
    if is_classifier(config):
        raise CheckpointError(f"{checkpoint}: a classifier (run.task={config.run.task}); it has no decoder. Give a MAE.")
    model = build_meta_mae(config)
    weights = dict(ZeroReader(checkpoint / DEEPSPEED_TAG))
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint}: the weights do not match its config ({' '.join(str(error).split())}).") from None
    return model.eval()
