"""The source of an export: the tensors of a checkpoint in the requested size, dtype and version. No tensor is read yet."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_mae.checkpoint.deepspeed_files import find_deepspeed_folder
from scale_mae.checkpoint.lazy_tensor import LazyTensor
from scale_mae.checkpoint.manifest import read_config, read_manifest
from scale_mae.checkpoint.paths import DEEPSPEED_TAG
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.config import Config, UserError
from scale_mae.model.pos_embed import resize_pos_embed
from scale_mae.weights.classifier_heads import ClassifierHead, read_head, select_probe, to_linear_head
from scale_mae.weights.metadata import METADATA_KEY, Pool, build_metadata, is_classifier

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RELEASE_INTERVAL = 1 << 25  # bytes of a checkpoint that stay mapped at most, in addition to one tensor
POS_EMBED_KEYS = ("pos_embed", "decoder_pos_embed")
CLASSIFIER_FORMATS = ("timm", "vit", "state_dict", "onnx", "torch_export")


@dataclass(frozen=True)
class ExportRequest:
    """The options of an export; see :func:`scale_mae.weights.convert.convert`."""

    to: str
    dtype: str = "fp32"
    image_size: tuple[int, int] | None = None
    pool: Pool | None = None
    ema: bool = False
    probe: int | None = None


@dataclass(frozen=True)
class ExportSource:
    """The tensors and metadata to export.

    Attributes:
        weights: The fp32 tensors with the keys of the checkpoint. Position embeddings have the requested image size. Of several
            linear probes only the selected one is present.
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        metadata: See :mod:`scale_mae.weights.metadata`.
        config: The configuration of the run with the requested image size. ``None`` for third-party checkpoints.
        exported: The tensors in the dtypes to write. A classifier has the keys of timm.
        head: The head of a classifier.
        max_bytes: The largest size of a file, for formats with several files.
    """

    weights: Mapping[str, LazyTensor]
    dtype: str
    metadata: dict[str, Any]
    config: Config | None
    exported: Mapping[str, LazyTensor]
    head: ClassifierHead | None = None
    max_bytes: float = math.inf

    @property
    def encoder(self) -> dict[str, LazyTensor]:
        """The encoder in ``exported`` with timm's keys for its pooling. For a classifier: all tensors, head included."""
        encoder = {key: t for key, t in self.exported.items() if not key.startswith("decoder_") and key != "mask_token"}
        if self.metadata["timm_kwargs"]["global_pool"] == "avg":
            encoder = {f"fc_{key}" if key.startswith("norm.") else key: t for key, t in encoder.items()}
        return encoder

    @property
    def header(self) -> dict[str, str]:
        """The metadata as JSON text under their key, for the header of a file."""
        return {METADATA_KEY: json.dumps(self.metadata)}


def open_checkpoint(checkpoint: Path, request: ExportRequest) -> ExportSource:
    """Open a checkpoint of scale_mae for export.

    Raises:
        UserError: The checkpoint does not support an option of the request.
    """
    config, reader = read_config(checkpoint), ZeroReader(checkpoint / DEEPSPEED_TAG)
    _check_options(checkpoint, config, request)
    head = read_head(config, reader, request.probe) if is_classifier(config) else None
    weights = _lazy_tensors(reader, "ema" if request.ema else "fp32")
    if head:
        weights = select_probe(weights, head)
    metadata = build_metadata(config, read_manifest(checkpoint).step, request.image_size, request.pool, head)
    metadata |= {"format": request.to, "dtype": request.dtype}
    metadata |= {"ema": config.optim.ema_decay} if request.ema else {}
    if request.image_size and request.image_size != config.model.image_size:
        config, weights = _resize(config, weights, request.image_size)
    keeps_buffers = request.to == "state_dict" and not head
    keys = set(reader.parameters) if keeps_buffers else None
    exported = _cast(to_linear_head(weights, head) if head else weights, request.dtype, keys)
    return ExportSource(weights, request.dtype, metadata, config, exported, head)


def open_deepspeed_folder(path: Path, request: ExportRequest, warn: Callable[[str], None]) -> ExportSource:
    """Open a folder that plain DeepSpeed code wrote for export.

    Raises:
        UserError: An option of the request needs a known model.
    """
    reader = ZeroReader(find_deepspeed_folder(path))
    options = {"--image-size": request.image_size, "--ema": request.ema, "--probe": request.probe is not None}
    unsupported = [f"--to {request.to}"] if request.to != "state_dict" else [name for name, value in options.items() if value]
    if unsupported:
        raise UserError(
            f"{unsupported[0]}: {path} is not a checkpoint of scale-mae, so its model is unknown. "
            "Use --to state_dict without further options."
        )
    if reader.without_frozen:
        warn(f"{path}: saved with exclude_frozen_parameters; it does not contain frozen parameters")
    weights = _lazy_tensors(reader)
    metadata = {"format": request.to, "dtype": request.dtype, "step": reader.step, "zero_stage": reader.stage}
    metadata |= {"world_size": reader.world_size}
    exported = _cast(weights, request.dtype, set(reader.parameters))
    return ExportSource(weights, request.dtype, metadata, config=None, exported=exported)


def _check_options(checkpoint: Path, config: Config, request: ExportRequest) -> None:
    if request.ema and config.optim.ema_decay is None:
        raise UserError(f"--ema: {checkpoint} has no moving average of the weights (optim.ema_decay was not set).")
    if not is_classifier(config):
        if request.probe is not None:
            raise UserError(f"--probe {request.probe}: {checkpoint} is not a linear probe (run.task={config.run.task}).")
        return
    if request.to not in CLASSIFIER_FORMATS:
        formats = ", ".join(CLASSIFIER_FORMATS)
        raise UserError(f"--to {request.to}: {checkpoint} is a classifier and has no decoder. Use one of {formats}.")
    if request.pool:
        raise UserError(f"--pool {request.pool}: {checkpoint} is a classifier and pools as it was trained. Omit --pool.")
    if request.to == "vit" and config.classify.pool == "mean":
        raise UserError(
            f"--to vit: {checkpoint} averages the patch tokens, which no classifier of transformers does. Use --to timm."
        )


def _lazy_tensors(reader: ZeroReader, key: str = "fp32") -> dict[str, LazyTensor]:
    """Return a checkpoint's tensors. Reading them releases the pages of earlier ones at intervals, to limit memory."""
    mapped = 0

    def chunks(name: str) -> Iterator[Tensor]:
        nonlocal mapped
        if mapped >= RELEASE_INTERVAL:
            reader.release()
            mapped = 0
        for part in reader.chunks(name, key):
            mapped += part.nbytes
            yield part

    return {name: replace(reader.lazy(name), chunks=partial(chunks, name)) for name in reader}


def _resize(
    config: Config, weights: dict[str, LazyTensor], image_size: tuple[int, int]
) -> tuple[Config, dict[str, LazyTensor]]:
    """Interpolate the position embeddings to another image size. Return the config with that size, and the tensors."""
    model = config.model
    if any(side < 1 or side % p for side, p in zip(image_size, model.patch, strict=True)):
        height, width = image_size
        raise UserError(f"--image-size {height}x{width}: not divisible by the patch size {list(model.patch)}.")
    old, new = ((height // model.patch[0], width // model.patch[1]) for height, width in (model.image_size, image_size))

    def resize(pos_embed: LazyTensor) -> LazyTensor:
        shape = (1, 1 + math.prod(new), pos_embed.shape[2])
        return replace(pos_embed, shape=shape, chunks=lambda: [resize_pos_embed(pos_embed.read(), old, new).reshape(-1)])

    resized = {key: resize(weights[key]) for key in POS_EMBED_KEYS if key in weights}
    return config.model_copy(update={"model": model.model_copy(update={"image_size": image_size})}), weights | resized


def _cast(weights: Mapping[str, LazyTensor], dtype: str, keys: set[str] | None) -> dict[str, LazyTensor]:
    """Cast the tensors with these keys, or all tensors if ``keys`` is ``None``."""
    return {key: t.to(DTYPES[dtype]) if keys is None or key in keys else t for key, t in weights.items()}
