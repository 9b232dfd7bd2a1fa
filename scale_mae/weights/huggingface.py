"""Names, configuration and pre-processing of transformers' ``ViTMAEForPreTraining``, ``ViTModel`` and
``ViTForImageClassification``, from ours and back.

Written are the names of the published files (``vit.encoder.layer.0.attention.attention.query.weight``), which every version
of transformers reads. Read are also those of its modules since version 5 (``vit.layers.0.attention.q_proj.weight``).
transformers holds query, key and value apart; here they are one tensor, ``qkv``, in that order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from scale_mae.checkpoint.safetensors_io import LazyTensor
from scale_mae.checkpoint.store import CheckpointError
from scale_mae.config import UserError

Kind = Literal["vit_mae", "vit"]
ARCHITECTURES: dict[Kind, str] = {"vit_mae": "ViTMAEForPreTraining", "vit": "ViTModel"}
CLASSIFIER = "ViTForImageClassification"
BICUBIC = 3  # Pillow's number for it
_QKV = ("query", "key", "value")
_OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "head": "classifier",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}
_INSIDE = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_BLOCKS = {"blocks": "encoder.layer", "decoder_blocks": "decoder.decoder_layers"}
# what files may say instead: the modules of transformers 5, and what its own saving makes of the decoder
_SPELLINGS = (
    (r"^vit\.", ""),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"^layers\.", "encoder.layer."),
    (r"\.attention\.([qkv])_proj\.", lambda m: f".attention.attention.{_QKV['qkv'.index(m[1])]}."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
_HEADS = ("pooler.", "classifier.")  # not pre-trained; left out


def _split(name: str) -> tuple[str, str]:
    stem, _, last = name.rpartition(".")
    return (stem, f".{last}") if last in ("weight", "bias") else (name, "")


def huggingface_names(name: str) -> tuple[str, ...]:
    """The name in a file for transformers, without the leading ``vit.``, of a tensor of ours; three for ``qkv``.

    Raises:
        KeyError: not a tensor of a MAE, nor of a classifier of the class token.
    """
    block = re.fullmatch(r"(blocks|decoder_blocks)\.(\d+)\.(.+)\.(weight|bias)", name)
    if not block:
        stem, last = _split(name)
        return (_OUTSIDE[stem] + last,)
    start, last = f"{_BLOCKS[block[1]]}.{block[2]}", f".{block[4]}"
    if block[3] == "attn.qkv":
        return tuple(f"{start}.attention.attention.{part}{last}" for part in _QKV)
    return (f"{start}.{_INSIDE[block[3]]}{last}",)


def to_huggingface(tensors: Mapping[str, LazyTensor], kind: Kind) -> dict[str, LazyTensor]:
    """Tensors of a MAE or a classifier under transformers' names, ``qkv`` cut in three; ``vit`` leaves the decoder out."""
    found, vit = {}, "" if kind == "vit" and "head.weight" not in tensors else "vit."
    for name, tensor in tensors.items():
        names = huggingface_names(name)
        if kind == "vit" and names[0].startswith("decoder."):
            continue
        prefix = "" if names[0].startswith(("decoder.", "classifier.")) else vit
        for third, theirs in enumerate(names):
            found[prefix + theirs] = _third(tensor, third) if len(names) == 3 else tensor
    return found


def _third(tensor: LazyTensor, which: int) -> LazyTensor:
    rows = tensor.shape[0] // 3
    return replace(
        tensor, shape=(rows, *tensor.shape[1:]), stretches=lambda: [tensor.read()[which * rows :][:rows].reshape(-1)]
    )


def from_huggingface(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ``ViTMAEForPreTraining``, ``ViTMAEModel``, ``ViTModel`` or ``ViTForImageClassification`` under our names.

    Pooler and classifier are left out.

    Raises:
        CheckpointError: a name that none of these models has, or a query, key or value without the others.
    """
    outside = {theirs: ours for ours, theirs in _OUTSIDE.items() if ours != "head"}
    inside = {theirs: ours for ours, theirs in _INSIDE.items()}
    blocks = {theirs: ours for ours, theirs in _BLOCKS.items()}
    found: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for given, tensor in weights.items():
        name = given
        for pattern, spelling in _SPELLINGS:
            name = re.sub(pattern, spelling, name)
        if name.startswith(_HEADS):
            continue
        block = re.fullmatch(r"(encoder\.layer|decoder\.decoder_layers)\.(\d+)\.(.+)\.(weight|bias)", name)
        stem, last = _split(name)
        part = block[3].removeprefix("attention.attention.") if block else ""
        if block and part in _QKV:
            thirds.setdefault(f"{blocks[block[1]]}.{block[2]}.attn.qkv.{block[4]}", {})[part] = tensor
        elif block and block[3] in inside:
            found[f"{blocks[block[1]]}.{block[2]}.{inside[block[3]]}.{block[4]}"] = tensor
        elif not block and stem in outside:
            found[outside[stem] + last] = tensor
        else:
            raise CheckpointError(f"{given}: no tensor of transformers' ViTMAE or ViT models has this name")
    for name, parts in thirds.items():
        if missing := [part for part in _QKV if part not in parts]:
            raise CheckpointError(f"{name}: {', '.join(missing)} missing beside {', '.join(parts)}")
        found[name] = torch.cat([parts[part] for part in _QKV])
    return found


def model_config(facts: Mapping[str, Any], kind: Kind, dtype: str) -> dict[str, Any]:
    """The ``config.json`` of a folder for transformers.

    Args:
        facts: from :func:`scale_mae.weights.models.describe`.
        kind: which model.
        dtype: as torch spells it, e.g. ``float32``.

    Raises:
        UserError: transformers cannot express the image or patch shape.
    """
    (height, width), (patch_h, patch_w) = facts["image_size"], facts["patch_size"]
    square = height == width and patch_h == patch_w
    if kind == "vit_mae" and not square:
        raise UserError(
            f"image {height} x {width} with patches {patch_h} x {patch_w}: transformers' ViTMAE takes square images and "
            "patches only; use --to mae, or --to vit for the encoder"
        )
    encoder, model = facts["timm_kwargs"], facts["config"]["model"]
    content: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": encoder["embed_dim"],
        "num_hidden_layers": encoder["depth"],
        "num_attention_heads": encoder["num_heads"],
        "intermediate_size": int(encoder["embed_dim"] * encoder["mlp_ratio"]),
        "hidden_act": "gelu",
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": facts["layer_norm_eps"],
        "image_size": height if height == width else [height, width],
        "patch_size": patch_h if patch_h == patch_w else [patch_h, patch_w],
        "num_channels": 3,
        "dtype": dtype,
        "torch_dtype": dtype,  # its name before version 5
    }
    if facts["timm_kwargs"]["num_classes"]:
        names = facts["label_names"]
        content |= {
            "architectures": [CLASSIFIER],
            "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)},
        }
    if kind == "vit_mae":
        content |= {
            "decoder_hidden_size": model["decoder_width"],
            "decoder_num_hidden_layers": model["decoder_depth"],
            "decoder_num_attention_heads": model["decoder_heads"],
            "decoder_intermediate_size": 4 * model["decoder_width"],
            "mask_ratio": facts["mask_ratio"],
            "norm_pix_loss": facts["norm_pixel"],
        }
    return content


def preprocessor_config(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The ``preprocessor_config.json``: pixels as in training, resized whole to the size of the model."""
    height, width = facts["image_size"]
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(facts["mean"]),
        "image_std": list(facts["std"]),
    }
