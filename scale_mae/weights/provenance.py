"""What is known of weights apart from their tensors: who trained them, attention heads, norm epsilon, pixel statistics.

The shapes of the tensors show widths, depths and patch size only. The rest is read from the metadata of scale_mae, the config
files of timm and transformers, or the options in a checkpoint of the reference repository.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.model.sizes import LAYER_NORM_EPS, SIZES
from scale_mae.weights.metadata import training_settings
from scale_mae.weights.weight_files import WeightFiles

# MoCo v3 stores ``arch`` only. Its small ViT has 12 attention heads instead of the usual 6.
MOCO_HEADS = {"vit_small": 12, "vit_base": 12}
ChannelValues = tuple[float, float, float]
HUGGINGFACE_EPS = 1e-12  # the default of transformers' ViT and ViTMAE


@dataclass(frozen=True)
class Provenance:
    """Where weights come from, and what is known of them. ``None`` means unknown.

    Attributes:
        kind: A description, such as ``timm vit_base_patch16_224``.
        heads: Attention heads of the encoder.
        decoder_heads: Attention heads of the decoder.
        image_size: (height, width) in pixels.
        layer_norm_eps: Epsilon of all norms.
        mean: Channel means (red, green, blue) of the normalization, for images in [0, 1].
        std: Channel standard deviations.
        pool: How a classifier of timm pools its tokens.
        step: Number of optimizer steps done.
        seed: Seed of the training.
        metadata: The metadata that scale_mae wrote, see :func:`scale_mae.weights.metadata.build_metadata`. ``None`` for
            third-party weights.
    """

    kind: str
    heads: int | None = None
    decoder_heads: int | None = None
    image_size: tuple[int, int] | None = None
    layer_norm_eps: float = LAYER_NORM_EPS
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    pool: str | None = None
    step: int | None = None
    seed: int | None = None
    metadata: Mapping[str, Any] | None = None

    @property
    def training_digest(self) -> str:
        """A short digest of the training by scale_mae, independent of seed and machine. Empty for third-party weights."""
        if self.metadata is None:
            return ""
        config = self.metadata["config"]
        settings = training_settings(config) | {
            **{key: self.metadata.get(key) for key in ("step", "ema", "probe", "initialized_from")},
            "task": config["run"]["task"],
            "from_weights": config["model"]["init_from"] is not None,
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]

    def summary(self) -> str:
        """Return kind, step and training digest, which are the same for every seed."""
        step = [] if self.step is None else [f"step {self.step}"]
        digest = [f"training {self.training_digest}"] if self.training_digest else []
        return ", ".join([self.kind, *step, *digest])


def detect_provenance(files: WeightFiles, is_huggingface: bool, width: int, decoder_width: int | None) -> Provenance:
    """Return what is known of the weights in a file or folder.

    Args:
        files: The file or folder.
        is_huggingface: Whether the tensors have the keys of transformers.
        width: Width of the encoder.
        decoder_width: Width of the decoder, 0 if the tensors do not show it, ``None`` if there is no decoder.

    Raises:
        CheckpointError: A config is damaged, or belongs to a model that is not a plain ViT.
    """
    provenance, folder = _read_provenance(files, is_huggingface, decoder_width is not None), files.files[0].parent
    for heads, dim in ((provenance.heads, width), (provenance.decoder_heads, decoder_width)):
        if heads and dim and dim % heads:
            raise CheckpointError(f"{folder}: the metadata is damaged ({heads} attention heads for a width of {dim}).")
    return provenance


def _read_provenance(files: WeightFiles, is_huggingface: bool, has_decoder: bool) -> Provenance:
    config_file = files.files[0].parent / "config.json"
    try:
        if "config" in files.metadata:
            return provenance_from_metadata(files.metadata, "scale-mae export")
        if is_huggingface:
            return _from_huggingface(files.config, files.processor, config_file)
        if isinstance(files.config.get("architecture"), str):
            return _from_timm(files.config, config_file)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        source = config_file.parent if "config" in files.metadata else config_file
        raise CheckpointError(f"{source}: the metadata is damaged ({error!r}).") from None
    return _from_bare_file(files, has_decoder)


def provenance_from_metadata(metadata: Mapping[str, Any], kind: str) -> Provenance:
    """Return the provenance of weights that scale_mae trained, from their metadata."""
    model = metadata["config"]["model"]
    return Provenance(
        kind,
        heads=_parse_heads(metadata["timm_kwargs"]["num_heads"]),
        decoder_heads=_parse_heads(model["decoder_heads"]),
        image_size=_parse_size(metadata["image_size"]),
        layer_norm_eps=_parse_positive(metadata["layer_norm_eps"]),
        mean=_parse_channels(metadata["mean"], _parse_finite),
        std=_parse_channels(metadata["std"], _parse_positive),
        step=int(metadata["step"]),
        seed=int(metadata["config"]["run"]["seed"]),
        metadata=metadata,
    )


def _from_huggingface(config: Mapping[str, Any], processor: Mapping[str, Any], path: Path) -> Provenance:
    activation = config.get("hidden_act", "gelu")
    if activation not in ("gelu", "gelu_python"):
        raise CheckpointError(f"{path}: hidden_act={activation!r} is not supported, because a MAE uses gelu.")
    size = config.get("image_size")
    return Provenance(
        f"Hugging Face {(config.get('architectures') or ['ViT'])[0]}",
        heads=_parse_heads(config.get("num_attention_heads")),
        decoder_heads=_parse_heads(config.get("decoder_num_attention_heads")),
        image_size=None if size is None else _parse_size(size),
        layer_norm_eps=_parse_positive(config.get("layer_norm_eps", HUGGINGFACE_EPS)),
        mean=_parse_channels(processor.get("image_mean"), _parse_finite),
        std=_parse_channels(processor.get("image_std"), _parse_positive),
    )


def _from_timm(config: Mapping[str, Any], path: Path) -> Provenance:
    """Read timm's ``config.json``. Build the architecture on the meta device to learn what its name means."""
    import timm
    from timm.models.beit import Beit
    from timm.models.vision_transformer import VisionTransformer

    name, args, pretrained_cfg = config["architecture"], config.get("model_args") or {}, config.get("pretrained_cfg") or {}
    if not timm.is_model(name):
        raise CheckpointError(f"{path}: timm has no architecture {name!r}.")
    with torch.device("meta"):
        model = timm.create_model(name)
    if not isinstance(model, VisionTransformer):
        advice = " BEiT is supported by evaluate, knn, logistic and embed only." if isinstance(model, Beit) else ""
        raise CheckpointError(f"{path}: timm's {name} is not a plain ViT but {type(model).__name__}.{advice}")
    block = model.blocks[0]
    if not isinstance(block.mlp.act, torch.nn.GELU):
        raise CheckpointError(f"{path}: the activation of timm's {name} is not supported, because a MAE uses gelu.")
    size = args.get("img_size")
    mean, std = read_channel_statistics(pretrained_cfg)
    return Provenance(
        f"timm {name}",
        heads=_parse_heads(args.get("num_heads", block.attn.num_heads)),
        image_size=None if size is None else _parse_size(size),
        layer_norm_eps=float(block.norm1.eps),
        mean=mean,
        std=std,
        pool=config.get("global_pool") or args.get("global_pool"),
    )


def read_channel_statistics(pretrained_cfg: Mapping[str, Any]) -> tuple[ChannelValues | None, ChannelValues | None]:
    """Return the channel means and standard deviations in timm's ``pretrained_cfg``, or ``None`` for a missing entry.

    Raises:
        ValueError, TypeError: An entry does not contain valid values for three channels.
    """
    mean, std = pretrained_cfg.get("mean"), pretrained_cfg.get("std")
    return _parse_channels(mean, _parse_finite), _parse_channels(std, _parse_positive)


def _from_bare_file(files: WeightFiles, has_decoder: bool) -> Provenance:
    """Read the values in a file without config. A pre-training checkpoint of the reference repository contains its options."""
    args = files.extras.get("args")
    options = vars(args) if isinstance(args, argparse.Namespace) else {}
    size_name = re.match(r"(?:mae_)?vit_(\w+)_patch\d+", str(options.get("model")))
    size = SIZES.get(size_name[1]) if size_name else None
    side = options.get("input_size")
    arch = files.extras.get("arch")
    moco_heads = MOCO_HEADS.get(arch) if isinstance(arch, str) and not has_decoder else None
    if has_decoder or files.state_dict_key:
        epoch = files.extras.get("epoch")
        kind = "MAE with reference keys" if has_decoder else "MAE encoder with reference keys"
        kind = "ViT of MoCo v3" if moco_heads else kind
        kind += f", epoch {epoch}" if isinstance(epoch, int) else ""
    else:
        kind = "ViT with timm keys"
    return Provenance(
        kind,
        heads=size.heads if size else moco_heads,
        image_size=_parse_size(side) if isinstance(side, int) and side > 0 else None,
        step=files.metadata.get("step"),  # a converted third-party DeepSpeed checkpoint has this entry only
        seed=options.get("seed") if isinstance(options.get("seed"), int) else None,
    )


def _parse_heads(count: Any) -> int | None:
    if count is not None and (type(count) is not int or count < 1):
        raise ValueError(f"{count!r} attention heads")
    return count


def _parse_size(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if int(height) < 1 or int(width) < 1:
        raise ValueError(f"images of {height} x {width} pixels")
    return int(height), int(width)


def _parse_channels(values: Any, parse: Callable[[Any], float]) -> ChannelValues | None:
    if values is None:
        return None
    if len(values) != 3:
        raise ValueError(f"{len(values)} channels instead of 3")
    red, green, blue = map(parse, values)
    return red, green, blue


def _parse_finite(value: Any) -> float:
    if not math.isfinite(float(value)):
        raise ValueError(f"{value} is not finite")
    return float(value)


def _parse_positive(value: Any) -> float:
    if _parse_finite(value) <= 0:
        raise ValueError(f"{value} is not positive")
    return float(value)
