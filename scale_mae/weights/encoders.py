"""Encoders as timm models: trained, or with the weights that their run started from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from timm.models.vision_transformer import VisionTransformer

from scale_mae.checkpoint.store import CheckpointError
from scale_mae.config import Config, UserError
from scale_mae.weights.initialization import initial_model, read_encoder
from scale_mae.weights.models import build_encoder, encoder_weights


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
    facts, weights = read_encoder(Path(path), warn)
    encoder = build_encoder(facts)
    encoder.load_state_dict(weights, strict=True)
    return encoder


def untrained_encoder(path: str | Path, warn: Callable[[str], None] = print) -> VisionTransformer:
    """The encoder of :func:`load_encoder` with the weights that its run began with.

    Raises:
        UserError: its run is not known or trained a classifier, or ``model.init_from`` is not there any more.
    """
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
