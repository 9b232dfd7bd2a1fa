"""BEiT and BEiT v2 in folders of timm, built as their config says and filled strictly.

A MAE has no place for their parts (relative positions, layer scale, no biases of keys), so they are measured and nothing else.
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

# of what create_model takes, all that the model itself does; it would also open files that a config names
ARGUMENTS = inspect.signature(Beit).parameters.keys() - {"norm_layer", "device", "dtype"}
INDEX = "relative_position_index"  # older versions of timm wrote it too; it follows from the grid of patches


@dataclass(frozen=True)
class LoadedBeit:
    """A BEiT and what its folder says of it.

    Attributes:
        model: on the host, in evaluation mode.
        name: timm's.
        digest: SHA-256 of its weights in hexadecimal.
        mean: channel means.
        std: channel deviations.
        crop_pct: share of the scaled short side that is cut out in evaluation.
    """

    model: Beit
    name: str
    digest: str
    mean: ChannelValues
    std: ChannelValues
    crop_pct: float

    @property
    def family(self) -> str:
        """``BEiT`` or ``BEiTv2``, which differ in their training only."""
        return "BEiTv2" if self.name.startswith("beitv2_") else "BEiT"


def is_beit(path: Path) -> bool:
    """Whether timm's config beside weights names a BEiT."""
    name = read_config_json(path).get("architecture")
    return isinstance(name, str) and name in timm.list_models(module="beit")


def read_beit(path: Path, head: bool, warn: Callable[[str], None]) -> LoadedBeit:
    """The model in a folder, or in a file with timm's config beside it.

    Args:
        path: for which :func:`is_beit` holds.
        head: whether it has to have a head; else one is left away.
        warn: told of a resampling filter that is not used here.

    Raises:
        CheckpointError: a damaged config or file, or a tensor missing, superfluous, of another shape or not finite; one line.
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
            raise ValueError("images that are not of three channels, normalised and cropped")
    except Exception as error:  # timm checks little of what it is given
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{path}: what its config.json says is damaged ({reason[:200]})") from None
    if head and (not empty.num_classes or empty.global_pool not in ("avg", "token")):
        says = f"num_classes={empty.num_classes}, global_pool={empty.global_pool!r}"
        raise CheckpointError(f"{path}: no classifier (its config.json: {says}); scale-mae knn, logistic and embed take it")
    left = (INDEX,) if head else (INDEX, "head.weight", "head.bias")
    tensors = {key: opened.tensors[key] for key in opened.tensors if not key.endswith(left)}
    tensors = _fitting(path, tensors, empty.state_dict(), name)
    if account.get("interpolation") != "bicubic":
        warn(f"{path}: its config.json scales images by {account.get('interpolation')!r}, here they are scaled bicubically")
    model = timm.create_model(name, pretrained=False, **arguments)
    model.load_state_dict(tensors, strict=True)
    return LoadedBeit(model.eval(), name, opened.digest(), mean, std, crop)


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    """What timm itself builds the model of a folder with.

    Raises:
        ValueError: an argument that is not the model's.
    """
    pretrained, args = config.get("pretrained_cfg") or {}, config.get("model_args") or {}
    if strange := sorted(args.keys() - ARGUMENTS):
        raise ValueError(f"model_args has {strange[0]}")
    told = {key: config[key] for key in ("num_classes", "global_pool") if config.get(key) is not None}
    if pretrained.get("input_size"):
        told["img_size"] = pretrained["input_size"][1:]
    return told | args


def _fitting(path: Path, tensors: dict[str, Tensor], wanted: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors in fp32, if they are those of the model and finite."""
    model = f"timm's {name} as its config.json has it"
    if superfluous := sorted(tensors.keys() - wanted.keys()):
        raise CheckpointError(f"{path}: unexpected key {first_of(superfluous)}; {model} does not have it")
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise CheckpointError(f"{path}: missing key {first_of(missing)}; {model} has it")
    for key, tensor in tensors.items():
        if tensor.shape != wanted[key].shape:
            told = f"{key} has shape {list(tensor.shape)}, {model} {list(wanted[key].shape)}"
            raise CheckpointError(f"{path}: {told}")
    return {key: to_finite_fp32(path, key, tensor) for key, tensor in tensors.items()}
