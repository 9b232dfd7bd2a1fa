"""Loads BEiT and BEiT v2 from timm's folders: builds the model of the config file and loads the weights strictly.

A MAE does not have their parts (relative positions, layer scale, no key biases), so they can only be evaluated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.beit import Beit
from torch import Tensor

from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.weights.key_matching import first_of, to_finite_fp32
from scale_mae.weights.provenance import ChannelValues, read_channel_statistics
from scale_mae.weights.weight_files import open_weights, read_config_json

# only the model's own arguments: create_model accepts others too, for example files that it then opens
ARGUMENTS = inspect.signature(Beit).parameters.keys() - {"norm_layer", "device", "dtype"}
INDEX = "relative_position_index"  # older versions of timm saved it; it is a function of the patch grid


@dataclass(frozen=True)
class LoadedBeit:
    """A BEiT and its settings from the config file.

    Attributes:
        model: The model, on the host, in evaluation mode.
        name: The model's name in timm.
        digest: The SHA-256 of the weights in hexadecimal.
        mean: The channel means.
        std: The channel standard deviations.
        crop_pct: The center crop of evaluation, as a share of the resized short side.
    """

    model: Beit
    name: str
    digest: str
    mean: ChannelValues
    std: ChannelValues
    crop_pct: float

    @property
    def family(self) -> str:
        """``BEiT`` or ``BEiTv2``. They differ only in their training."""
        return "BEiTv2" if self.name.startswith("beitv2_") else "BEiT"


def is_beit(path: Path) -> bool:
    """Whether timm's config file next to the weights names a BEiT."""
    name = read_config_json(path).get("architecture")
    return isinstance(name, str) and name in timm.list_models(module="beit")


def read_beit(path: Path, head: bool, warn: Callable[[str], None]) -> LoadedBeit:
    """Load the model from a folder, or from a file with timm's config file next to it.

    Args:
        path: A path for which :func:`is_beit` is true.
        head: Require and load the classification head. ``False``: ignore it.
        warn: Receives a warning if the config names another resampling filter than bicubic.

    Raises:
        CheckpointError: The config or the file is damaged, or a tensor is missing, unexpected, misshapen or not finite.
    """
    opened = open_weights(path)
    if damage := opened.find_damage():
        raise CheckpointError(damage)
    name = opened.config["architecture"]
    try:
        arguments = _arguments(opened.config) | ({} if head else {"num_classes": 0})
        with torch.device("meta"):
            empty = timm.create_model(name, pretrained=False, **arguments)
        account = dict(empty.pretrained_cfg) | dict(opened.config.get("pretrained_cfg") or {})
        mean, std = read_channel_statistics(account)
        crop = float(account["crop_pct"])
        if not mean or not std or not 0 < crop <= 1 or empty.patch_embed.proj.in_channels != 3:
            raise ValueError("mean, std, crop_pct or the number of channels is missing or invalid")
    except Exception as error:  # timm hardly checks its arguments
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{path}: config.json is damaged ({reason[:200]})") from None
    if head and (not empty.num_classes or empty.global_pool not in ("avg", "token")):
        settings = f"num_classes={empty.num_classes}, global_pool={empty.global_pool!r}"
        raise CheckpointError(f"{path}: not a classifier (config.json: {settings}); use scale-mae knn, logistic or embed")
    left = (INDEX,) if head else (INDEX, "head.weight", "head.bias")
    tensors = {key: opened.tensors[key] for key in opened.tensors if not key.endswith(left)}
    tensors = _match(path, tensors, empty.state_dict(), name)
    if account.get("interpolation") != "bicubic":
        warn(f"{path}: config.json asks for {account.get('interpolation')!r} resampling; evaluation uses bicubic")
    model = timm.create_model(name, pretrained=False, **arguments)
    model.load_state_dict(tensors, strict=True)
    return LoadedBeit(model.eval(), name, opened.digest(), mean, std, crop)


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with which timm builds the model of a folder.

    Raises:
        ValueError: The config has an argument that the model does not have.
    """
    pretrained, args = config.get("pretrained_cfg") or {}, config.get("model_args") or {}
    if unknown := sorted(args.keys() - ARGUMENTS):
        raise ValueError(f"unknown model_args {unknown[0]}")
    arguments = {key: config[key] for key in ("num_classes", "global_pool") if config.get(key) is not None}
    if pretrained.get("input_size"):
        arguments["img_size"] = pretrained["input_size"][1:]
    return arguments | args


def _match(path: Path, tensors: dict[str, Tensor], wanted: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors in fp32, after checking names, shapes and finite values."""
    model = f"timm's {name} with this config.json"
    if superfluous := sorted(tensors.keys() - wanted.keys()):
        raise CheckpointError(f"{path}: unexpected key {first_of(superfluous)}; {model} does not have it")
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise CheckpointError(f"{path}: missing key {first_of(missing)}; {model} has it")
    for key, tensor in tensors.items():
        if tensor.shape != wanted[key].shape:
            problem = f"{key} has shape {list(tensor.shape)}, {model} has {list(wanted[key].shape)}"
            raise CheckpointError(f"{path}: {problem}")
    return {key: to_finite_fp32(path, key, tensor) for key, tensor in tensors.items()}
