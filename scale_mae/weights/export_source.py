"""What is exported: the tensors of a checkpoint, in the size, type and version that was asked for, none of them read yet."""

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

from scale_mae.checkpoint.safetensors_io import LazyTensor
from scale_mae.checkpoint.store import DEEPSPEED_TAG, read_config, read_manifest
from scale_mae.checkpoint.zero_files import find_folder
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.config import Config, UserError
from scale_mae.model.pos_embed import resize_pos_embed
from scale_mae.weights.classifier_heads import Head, chosen, plain, read_head
from scale_mae.weights.metadata import METADATA_KEY, Pool, describe, is_classifier

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RELEASE_EVERY = 1 << 25  # bytes of a checkpoint that are held mapped at most, but for one tensor
TABLES = ("pos_embed", "decoder_pos_embed")
OF_CLASSIFIERS = ("timm", "vit", "state_dict", "onnx", "torch_export")


@dataclass(frozen=True)
class ExportRequest:
    """What is asked for; see :func:`scale_mae.weights.convert.convert`."""

    to: str
    dtype: str = "fp32"
    image_size: tuple[int, int] | None = None
    pool: Pool | None = None
    ema: bool = False
    probe: int | None = None


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        weights: fp32, under the checkpoint's names; position tables of the size asked for; of several probes one.
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        facts: see :mod:`scale_mae.weights.metadata`.
        config: of the run, with the image size asked for; None for what others trained.
        exported: the weights in the types that they are written in; of a classifier under timm's names.
        head: of a classifier.
        max_bytes: of a file, where a format may have several.
    """

    weights: Mapping[str, LazyTensor]
    dtype: str
    facts: dict[str, Any]
    config: Config | None
    exported: Mapping[str, LazyTensor]
    head: Head | None = None
    max_bytes: float = math.inf

    @property
    def encoder(self) -> dict[str, LazyTensor]:
        """The encoder's part of ``exported``, under the names that timm has for its way of pooling; a classifier whole."""
        part = {n: t for n, t in self.exported.items() if not n.startswith("decoder_") and n != "mask_token"}
        if self.facts["timm_kwargs"]["global_pool"] == "avg":
            part = {f"fc_{n}" if n.startswith("norm.") else n: t for n, t in part.items()}
        return part

    @property
    def metadata(self) -> dict[str, str]:
        """The facts as a text under their key."""
        return {METADATA_KEY: json.dumps(self.facts)}


def open_ours(checkpoint: Path, wish: ExportRequest) -> Source:
    """A checkpoint of ours.

    Raises:
        UserError: what it cannot give.
    """
    config, reader = read_config(checkpoint), ZeroReader(checkpoint / DEEPSPEED_TAG)
    _check_wish(checkpoint, config, wish)
    head = read_head(config, reader, wish.probe) if is_classifier(config) else None
    weights = _lazily(reader, "ema" if wish.ema else "fp32")
    if head:
        weights = chosen(weights, head)
    facts = describe(config, read_manifest(checkpoint).step, wish.image_size, wish.pool, head)
    facts |= {"format": wish.to, "dtype": wish.dtype}
    facts |= {"ema": config.optim.ema_decay} if wish.ema else {}
    if wish.image_size and wish.image_size != config.model.image_size:
        config, weights = _resized(config, weights, wish.image_size)
    whole = wish.to == "state_dict" and not head  # buffers stay as they are
    exported = _rounded(plain(weights, head) if head else weights, wish.dtype, set(reader.parameters) if whole else None)
    return Source(weights, wish.dtype, facts, config, exported, head)


def open_foreign(path: Path, wish: ExportRequest, warn: Callable[[str], None]) -> Source:
    """A folder that plain DeepSpeed code wrote.

    Raises:
        UserError: what is asked for needs to know the model.
    """
    reader = ZeroReader(find_folder(path))
    options = {"--image-size": wish.image_size, "--ema": wish.ema, "--probe": wish.probe is not None}
    unfit = [f"--to {wish.to}"] if wish.to != "state_dict" else [name for name, given in options.items() if given]
    if unfit:
        raise UserError(f"{path}: not a checkpoint of scale-mae; {unfit[0]} needs to know the model (use --to state_dict)")
    if reader.without_frozen:
        warn(f"{path}: saved with exclude_frozen_parameters; its frozen parameters, if it has any, are not in it")
    weights = _lazily(reader)
    facts = {"format": wish.to, "dtype": wish.dtype, "step": reader.step, "zero_stage": reader.stage}
    facts |= {"world_size": reader.world_size}
    return Source(weights, wish.dtype, facts, None, _rounded(weights, wish.dtype, set(reader.parameters)))


def _check_wish(checkpoint: Path, config: Config, wish: ExportRequest) -> None:
    if wish.ema and config.optim.ema_decay is None:
        raise UserError(f"--ema: {checkpoint} keeps no moving average of its weights (optim.ema_decay)")
    if not is_classifier(config):
        if wish.probe is not None:
            raise UserError(f"--probe {wish.probe}: {checkpoint} is no linear probe (run.task={config.run.task})")
        return
    if wish.to not in OF_CLASSIFIERS:
        formats = ", ".join(OF_CLASSIFIERS)
        raise UserError(f"--to {wish.to}: {checkpoint} is a classifier, which has no decoder; there are {formats}")
    if wish.pool:
        raise UserError(f"--pool {wish.pool}: {checkpoint} is a classifier, which pools as it was trained; leave it out")
    if wish.to == "vit" and config.classify.pool == "mean":
        raise UserError(
            f"--to vit: {checkpoint} averages the patch tokens, which no classifier of transformers' does; use timm"
        )


def _lazily(reader: ZeroReader, key: str = "fp32") -> dict[str, LazyTensor]:
    """A checkpoint's tensors; now and then the pages read for earlier ones are given back."""
    mapped = 0

    def stretches(name: str) -> Iterator[Tensor]:
        nonlocal mapped
        if mapped >= RELEASE_EVERY:
            reader.release()
            mapped = 0
        for part in reader.stretches(name, key):
            mapped += part.nbytes
            yield part

    return {name: replace(reader.lazy(name), stretches=partial(stretches, name)) for name in reader}


def _resized(
    config: Config, weights: dict[str, LazyTensor], image_size: tuple[int, int]
) -> tuple[Config, dict[str, LazyTensor]]:
    model = config.model
    if any(side < 1 or side % p for side, p in zip(image_size, model.patch, strict=True)):
        raise UserError(f"--image-size {image_size[0]}x{image_size[1]}: not divisible by patches of {list(model.patch)} pixels")
    old, new = ((height // model.patch[0], width // model.patch[1]) for height, width in (model.image_size, image_size))

    def resized(table: LazyTensor) -> LazyTensor:
        shape = (1, 1 + math.prod(new), table.shape[2])
        return replace(table, shape=shape, stretches=lambda: [resize_pos_embed(table.read(), old, new).reshape(-1)])

    tables = {name: resized(weights[name]) for name in TABLES if name in weights}
    return config.model_copy(update={"model": model.model_copy(update={"image_size": image_size})}), weights | tables


def _rounded(weights: Mapping[str, LazyTensor], dtype: str, names: set[str] | None) -> dict[str, LazyTensor]:
    """``names`` rounded, all if None."""
    return {n: t.to(DTYPES[dtype]) if names is None or n in names else t for n, t in weights.items()}
