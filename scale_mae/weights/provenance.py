"""What the surroundings of weights tell about them: the options of the reference, the config files of timm and transformers.

Shapes tell widths, depths and patches; attention heads, norm epsilon and pixel statistics they do not tell.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from scale_mae.checkpoint.store import CheckpointError
from scale_mae.model.sizes import LAYER_NORM_EPS, SIZES
from scale_mae.weights.metadata import recipe_of
from scale_mae.weights.weight_files import Opened

MOCO_HEADS = {"vit_small": 12, "vit_base": 12}  # of MoCo v3, whose small ViT has twice the usual; it writes ``arch`` alone
Channels = tuple[float, float, float]
HUGGINGFACE_EPS = 1e-12  # of transformers' ViT and ViTMAE where the config does not say


@dataclass(frozen=True)
class Origin:
    """Where weights come from and what is known of them; None where nothing says.

    Attributes:
        kind: in words.
        heads: attention heads of the encoder.
        decoder_heads: of the decoder.
        image_size: (height, width) in pixels.
        layer_norm_eps: of all norms.
        mean: channel means (red, green, blue) that images in [0, 1] were normalised with.
        std: channel deviations.
        pool: how a classifier of timm makes one vector of the tokens.
        step: optimizer steps done.
        seed: of the training.
        ours: what :func:`scale_mae.weights.metadata.describe` gave, if scale_mae wrote them.
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
    ours: Mapping[str, Any] | None = None

    @property
    def training(self) -> str:
        """What scale_mae trained, whatever the seed and the machine, as a short digest; empty of others' weights."""
        if self.ours is None:
            return ""
        config, told = self.ours["config"], {key: self.ours.get(key) for key in ("step", "ema", "probe", "began_with")}
        told |= {"task": config["run"]["task"], "from_weights": config["model"]["init_from"] is not None}
        alike = recipe_of(config) | told
        return hashlib.sha256(json.dumps(alike, sort_keys=True).encode()).hexdigest()[:8]


def origin_of(opened: Opened, huggingface: bool, width: int, decoder_width: int | None) -> Origin:
    """What is known of the weights in a file or folder.

    Args:
        opened: the file or folder.
        huggingface: whether the tensors have transformers' names.
        width: of the encoder.
        decoder_width: of a MAE's decoder, 0 if it cannot be told; None: no part of one is there.

    Raises:
        CheckpointError: a config that is damaged, or one of a model that computes otherwise than a plain ViT.
    """
    origin, place = _origin(opened, huggingface, decoder_width is not None), opened.files[0].parent
    for heads, wide in ((origin.heads, width), (origin.decoder_heads, decoder_width)):
        if heads and wide and wide % heads:
            raise CheckpointError(f"{place}: what it says of itself is damaged ({heads} attention heads for a width of {wide})")
    return origin


def _origin(opened: Opened, huggingface: bool, decoder: bool) -> Origin:
    try:
        if "config" in opened.facts:
            return of_ours(opened.facts, "scale-mae export")
        if huggingface:
            return _of_huggingface(opened.config, opened.processor)
        if isinstance(opened.config.get("architecture"), str):
            return _of_timm(opened.config)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{opened.files[0].parent}: what it says of itself is damaged ({error!r})") from None
    return _of_reference(opened, decoder)


def of_ours(facts: Mapping[str, Any], kind: str) -> Origin:
    """From what :func:`scale_mae.weights.metadata.describe` gave."""
    model = facts["config"]["model"]
    return Origin(
        kind,
        heads=_heads(facts["timm_kwargs"]["num_heads"]),
        decoder_heads=_heads(model["decoder_heads"]),
        image_size=_pair(facts["image_size"]),
        layer_norm_eps=_positive(facts["layer_norm_eps"]),
        mean=_channels(facts["mean"], _finite),
        std=_channels(facts["std"], _positive),
        step=int(facts["step"]),
        seed=int(facts["config"]["run"]["seed"]),
        ours=facts,
    )


def _of_huggingface(config: Mapping[str, Any], processor: Mapping[str, Any]) -> Origin:
    activation = config.get("hidden_act", "gelu")
    if activation not in ("gelu", "gelu_python"):
        raise CheckpointError(f"config.json: hidden_act={activation!r} is another activation than a MAE's, gelu")
    side = config.get("image_size")
    return Origin(
        f"Hugging Face {(config.get('architectures') or ['ViT'])[0]}",
        heads=_heads(config.get("num_attention_heads")),
        decoder_heads=_heads(config.get("decoder_num_attention_heads")),
        image_size=None if side is None else _pair(side),
        layer_norm_eps=_positive(config.get("layer_norm_eps", HUGGINGFACE_EPS)),
        mean=_channels(processor.get("image_mean"), _finite),
        std=_channels(processor.get("image_std"), _positive),
    )


def _of_timm(config: Mapping[str, Any]) -> Origin:
    """From the folder's config; the architecture is built without memory to see what its name stands for."""
    import timm
    from timm.models.beit import Beit
    from timm.models.vision_transformer import VisionTransformer

    name, args, pretrained = config["architecture"], config.get("model_args") or {}, config.get("pretrained_cfg") or {}
    if not timm.is_model(name):
        raise CheckpointError(f"config.json: timm has no architecture {name!r}")
    with torch.device("meta"):
        model = timm.create_model(name)
    if not isinstance(model, VisionTransformer):
        more = "; evaluate, knn, logistic and embed take it as it is, nothing else does" if isinstance(model, Beit) else ""
        raise CheckpointError(f"config.json: timm's {name} is not a plain ViT but {type(model).__name__}{more}")
    block = model.blocks[0]
    if not isinstance(block.mlp.act, torch.nn.GELU):
        raise CheckpointError(f"config.json: timm's {name} has another activation than a MAE's, gelu")
    side = args.get("img_size")
    mean, std = channel_statistics(pretrained)
    return Origin(
        f"timm {name}",
        heads=_heads(args.get("num_heads", block.attn.num_heads)),
        image_size=None if side is None else _pair(side),
        layer_norm_eps=float(block.norm1.eps),
        mean=mean,
        std=std,
        pool=config.get("global_pool") or args.get("global_pool"),
    )


def channel_statistics(pretrained: Mapping[str, Any]) -> tuple[Channels | None, Channels | None]:
    """Channel means and deviations in timm's ``pretrained_cfg``; None where it says nothing.

    Raises:
        ValueError, TypeError: not those of three channels.
    """
    return _channels(pretrained.get("mean"), _finite), _channels(pretrained.get("std"), _positive)


def _of_reference(opened: Opened, decoder: bool) -> Origin:
    """Nothing but a file; the reference's pre-training checkpoints hold its options."""
    args = opened.beside.get("args")
    options = vars(args) if isinstance(args, argparse.Namespace) else {}
    size = re.match(r"(?:mae_)?vit_(\w+)_patch\d+", str(options.get("model")))
    known = SIZES.get(size[1]) if size else None
    side = options.get("input_size")
    arch = opened.beside.get("arch")
    moco = MOCO_HEADS.get(arch) if isinstance(arch, str) and not decoder else None
    if decoder or opened.wrapped:
        epoch = opened.beside.get("epoch")
        kind = "ViT of MoCo v3" if moco else "MAE with the reference's names" + ("" if decoder else ", encoder only")
        kind += f", epoch {epoch}" if isinstance(epoch, int) else ""
    else:
        kind = "ViT with timm's names"
    image_size = _pair(side) if isinstance(side, int) and side > 0 else None
    seed = options.get("seed") if isinstance(options.get("seed"), int) else None
    # a DeepSpeed checkpoint of others that was converted holds its step and nothing else
    heads = known.heads if known else moco
    return Origin(kind, heads, image_size=image_size, step=opened.facts.get("step"), seed=seed)


def _heads(count: Any) -> int | None:
    if count is not None and (type(count) is not int or count < 1):
        raise ValueError(f"{count!r} attention heads")
    return count


def _pair(side: Any) -> tuple[int, int]:
    height, width = (side, side) if isinstance(side, int) else side
    if int(height) < 1 or int(width) < 1:
        raise ValueError(f"images of {height} x {width}")
    return int(height), int(width)


def _channels(values: Any, number: Callable[[Any], float]) -> Channels | None:
    if values is None:
        return None
    if len(values) != 3:
        raise ValueError(f"{len(values)} channels")
    red, green, blue = map(number, values)
    return red, green, blue


def _finite(value: Any) -> float:
    if not math.isfinite(float(value)):
        raise ValueError(f"{value} is no number")
    return float(value)


def _positive(value: Any) -> float:
    if _finite(value) <= 0:
        raise ValueError(f"{value} is not positive")
    return float(value)
