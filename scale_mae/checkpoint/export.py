"""Checkpoints become inference weights: an encoder file that timm loads, which says itself how to use it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from scale_mae.checkpoint.store import CheckpointError, locate, read_config, read_manifest
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.config import Config, UserError
from scale_mae.engine import TAG
from scale_mae.model.mae import LAYER_NORM_EPS, MAE, build_mae
from scale_mae.model.sizes import SIZES

METADATA_KEY = "scale_mae"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest difference of a feature between the exported file and the live model, relative to the features' deviation.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.25, "fp16": 0.05}
TIMM_NAMES = {
    "nano": "vit_tiny_patch16_224",
    "tiny": "vit_tiny_patch16_224",
    "small": "vit_small_patch16_224",
    "base": "vit_base_patch16_224.mae",
    "large": "vit_large_patch16_224.mae",
    "huge": "vit_huge_patch14_224.mae",
    "giant": "vit_giant_patch14_224",
    "2b": "vit_huge_patch14_224",
}


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
        CheckpointError: a tensor is missing, superfluous or misshapen.
    """
    with torch.device("meta"):
        model = model_from_config(read_config(checkpoint))
    weights = dict(ZeroReader(checkpoint / TAG))
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint}: does not fit its config ({' '.join(str(error).split())})") from None
    return model.eval()


def describe(config: Config, step: int) -> dict[str, Any]:
    """All that a user of exported weights has to know."""
    m, size = config.model, SIZES[config.model.size]
    return {
        "timm_name": TIMM_NAMES[m.size],
        "timm_kwargs": {
            "img_size": list(m.image_size),
            "patch_size": list(m.patch),
            "embed_dim": size.width,
            "depth": size.depth,
            "num_heads": size.heads,
            "mlp_ratio": size.mlp_ratio,
            "num_classes": 0,
            "global_pool": "token",
        },
        "image_size": list(m.image_size),
        "patch_size": list(m.patch),
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "interpolation": "bicubic",
        "layer_norm_eps": LAYER_NORM_EPS,
        "pooling": "none applied in training; class token first, or the mean of the patch tokens",
        "norm_pixel": m.target == "norm_pixel",
        "mask_ratio": m.mask_ratio,
        "step": step,
        "config_digest": config.digest(),
        "config": config.model_dump(mode="json"),
    }


def encoder_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of a MAE's state, under timm's names (which are the same)."""
    return {n: t for n, t in weights.items() if not n.startswith("decoder_") and n != "mask_token"}


def build_encoder(facts: dict[str, Any]) -> VisionTransformer:
    """An empty timm model for exported weights; ``pretrained_cfg`` holds image size, mean and deviation."""
    encoder = timm.create_model(facts["timm_name"], pretrained=False, **facts["timm_kwargs"])
    assert isinstance(encoder, VisionTransformer)
    encoder.pretrained_cfg |= {
        "input_size": (3, *facts["image_size"]),
        "mean": tuple(facts["mean"]),
        "std": tuple(facts["std"]),
        "interpolation": facts["interpolation"],
        "num_classes": 0,
    }
    return encoder.eval()


def convert_to_timm(source: str | Path, out: str | Path, dtype: str = "fp32", warn: Callable[[str], None] = print) -> Path:
    """Write a checkpoint's encoder as a safetensors file for ``timm.create_model(...).load_state_dict(..., strict=True)``.

    The file gets its name only after its features were found equal to the live model's.

    Args:
        source: run directory or checkpoint.
        out: the file.
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        warn: told of damaged checkpoints that were passed over.

    Returns:
        ``out``.

    Raises:
        UserError: no usable checkpoint, ``out`` not writable, or features that differ.
    """
    checkpoint, out = locate(source, warn), Path(out)
    facts = describe(read_config(checkpoint), read_manifest(checkpoint).step) | {"dtype": dtype}
    live = load_mae(checkpoint)
    weights = {n: t.to(DTYPES[dtype]).contiguous() for n, t in encoder_weights(live.state_dict()).items()}
    staging = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, staging, metadata={"format": "pt", METADATA_KEY: json.dumps(facts)})
        del weights
        _check_features(live, load_encoder(staging), dtype, out)
        mask = os.umask(0)
        os.umask(mask)
        staging.chmod(0o666 & ~mask)  # safetensors makes files that only their owner may read
        os.replace(staging, out)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{out}: cannot be written ({error})") from None
    finally:
        staging.unlink(missing_ok=True)
    return out


@torch.inference_mode()
def _check_features(live: MAE, exported: VisionTransformer, dtype: str, out: Path) -> None:
    images = torch.randn(2, 3, *live.image_size, generator=torch.Generator().manual_seed(0))
    expected = live.features(images)
    difference = ((exported.float().forward_features(images) - expected).abs().max() / expected.std()).item()
    if not difference <= TOLERANCE[dtype]:
        raise UserError(
            f"{out}: not written; its features differ from the live model's by {difference:.2g} of their deviation, "
            f"more than {TOLERANCE[dtype]} for {dtype}"
        )


def load_encoder(path: str | Path, warn: Callable[[str], None] = print) -> VisionTransformer:
    """A trained encoder as a timm model in evaluation mode.

    Args:
        path: a file that :func:`convert_to_timm` wrote, a run directory, or a checkpoint.
        warn: told of damaged checkpoints that were passed over.

    Returns:
        A timm VisionTransformer without head; ``forward_features(images)`` gives ``[B, 1 + L, D]``, class token first.
        ``pretrained_cfg`` holds the image size, mean and deviation it was trained with.

    Raises:
        UserError: nothing usable there.
    """
    facts, weights = _read(Path(path), warn)
    encoder = build_encoder(facts)
    encoder.load_state_dict(weights, strict=True)
    return encoder


def untrained_encoder(path: str | Path, warn: Callable[[str], None] = print) -> VisionTransformer:
    """The encoder of :func:`load_encoder` with the weights that its run began with."""
    facts, _ = _read(Path(path), warn)
    model = model_from_config(Config.model_validate(facts["config"]))
    encoder = build_encoder(facts)
    encoder.load_state_dict(encoder_weights(model.state_dict()), strict=True)
    return encoder


def _read(path: Path, warn: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if path.is_dir():
        checkpoint = locate(path, warn)
        facts = describe(read_config(checkpoint), read_manifest(checkpoint).step)
        return facts, encoder_weights(dict(ZeroReader(checkpoint / TAG)))
    return read_export(path)


def read_export(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of an exported file.

    Raises:
        UserError: no such file, or not one of ours.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if METADATA_KEY not in metadata:
                raise UserError(f"{path}: not written by scale-mae convert (no {METADATA_KEY} metadata)")
            return json.loads(metadata[METADATA_KEY]), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
