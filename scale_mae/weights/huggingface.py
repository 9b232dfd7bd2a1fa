"""Maps keys and configuration between scale_mae and Hugging Face transformers.

Supported are ``ViTMAEForPreTraining``, ``ViTModel`` and ``ViTForImageClassification``. Exports use the keys of the published
files (``vit.encoder.layer.0.attention.attention.query.weight``), which every version of transformers reads. Imports also accept
the module names of transformers 5 (``vit.layers.0.attention.q_proj.weight``). transformers stores query, key and value
separately; scale_mae stores them in this order in one tensor, ``qkv``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.checkpoint.lazy_tensor import LazyTensor
from scale_mae.config import UserError

ModelType = Literal["vit_mae", "vit"]
ARCHITECTURES: dict[ModelType, str] = {"vit_mae": "ViTMAEForPreTraining", "vit": "ViTModel"}
CLASSIFIER_ARCHITECTURE = "ViTForImageClassification"
BICUBIC = 3  # Pillow's number of the resampling filter
_QKV = ("query", "key", "value")
# Keys of scale_mae -> keys of transformers.
_TOP_LEVEL_KEYS = {
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
_BLOCK_KEYS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_STACKS = {"blocks": "encoder.layer", "decoder_blocks": "decoder.decoder_layers"}
# Other keys in files of transformers -> the keys above: the modules of version 5, and the decoder as version 5 saves it.
_ALIASES = (
    (r"^vit\.", ""),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"^layers\.", "encoder.layer."),
    (r"\.attention\.([qkv])_proj\.", lambda m: f".attention.attention.{_QKV['qkv'.index(m[1])]}."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
_SKIPPED_PREFIXES = ("pooler.", "classifier.")


def _split_suffix(key: str) -> tuple[str, str]:
    """Split ``.weight`` or ``.bias`` from a key."""
    stem, _, last = key.rpartition(".")
    return (stem, f".{last}") if last in ("weight", "bias") else (key, "")


def huggingface_keys(key: str) -> tuple[str, ...]:
    """Return the key of transformers, without the leading ``vit.``, for a key of scale_mae. ``qkv`` has three.

    Raises:
        KeyError: The key belongs neither to a MAE nor to a classifier of the class token.
    """
    block = re.fullmatch(r"(blocks|decoder_blocks)\.(\d+)\.(.+)\.(weight|bias)", key)
    if not block:
        stem, suffix = _split_suffix(key)
        return (_TOP_LEVEL_KEYS[stem] + suffix,)
    prefix, suffix = f"{_STACKS[block[1]]}.{block[2]}", f".{block[4]}"
    if block[3] == "attn.qkv":
        return tuple(f"{prefix}.attention.attention.{part}{suffix}" for part in _QKV)
    return (f"{prefix}.{_BLOCK_KEYS[block[3]]}{suffix}",)


def to_huggingface(tensors: Mapping[str, LazyTensor], model_type: ModelType) -> dict[str, LazyTensor]:
    """Return the tensors of a MAE or a classifier under the keys of transformers. ``vit`` omits the decoder."""
    is_bare_encoder = model_type == "vit" and "head.weight" not in tensors
    renamed = {}
    for key, tensor in tensors.items():
        new_keys = huggingface_keys(key)
        if model_type == "vit" and new_keys[0].startswith("decoder."):
            continue
        prefix = "" if is_bare_encoder or new_keys[0].startswith(("decoder.", "classifier.")) else "vit."
        for third, new_key in enumerate(new_keys):
            renamed[prefix + new_key] = _slice_third(tensor, third) if len(new_keys) == 3 else tensor
    return renamed


def _slice_third(tensor: LazyTensor, index: int) -> LazyTensor:
    """Return one third of the rows of ``qkv``."""
    rows = tensor.shape[0] // 3
    return replace(tensor, shape=(rows, *tensor.shape[1:]), chunks=lambda: [tensor.read()[index * rows :][:rows].reshape(-1)])


def from_huggingface(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a ViT or ViTMAE model of transformers under the keys of scale_mae, without pooler and classifier.

    Raises:
        CheckpointError: A key belongs to none of these models, or a query, key or value is missing.
    """
    top_level = {hf_key: key for key, hf_key in _TOP_LEVEL_KEYS.items() if key != "head"}
    block_keys = {hf_key: key for key, hf_key in _BLOCK_KEYS.items()}
    stacks = {hf_key: key for key, hf_key in _STACKS.items()}
    renamed: dict[str, Tensor] = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    for original, tensor in weights.items():
        key = original
        for pattern, replacement in _ALIASES:
            key = re.sub(pattern, replacement, key)
        if key.startswith(_SKIPPED_PREFIXES):
            continue
        block = re.fullmatch(r"(encoder\.layer|decoder\.decoder_layers)\.(\d+)\.(.+)\.(weight|bias)", key)
        stem, suffix = _split_suffix(key)
        part = block[3].removeprefix("attention.attention.") if block else ""
        if block and part in _QKV:
            qkv.setdefault(f"{stacks[block[1]]}.{block[2]}.attn.qkv.{block[4]}", {})[part] = tensor
        elif block and block[3] in block_keys:
            renamed[f"{stacks[block[1]]}.{block[2]}.{block_keys[block[3]]}.{block[4]}"] = tensor
        elif not block and stem in top_level:
            renamed[top_level[stem] + suffix] = tensor
        else:
            raise CheckpointError(f"unexpected key {original}; the ViT and ViTMAE models of transformers do not have it.")
    for key, parts in qkv.items():
        if missing := [part for part in _QKV if part not in parts]:
            raise CheckpointError(f"{key}: {' and '.join(missing)} missing, but {' and '.join(parts)} present.")
        renamed[key] = torch.cat([parts[part] for part in _QKV])
    return renamed


def build_model_config(metadata: Mapping[str, Any], model_type: ModelType, dtype: str) -> dict[str, Any]:
    """Return the ``config.json`` of transformers.

    Args:
        metadata: See :func:`scale_mae.weights.metadata.build_metadata`.
        model_type: The model type of transformers.
        dtype: The dtype as torch spells it, such as ``float32``.

    Raises:
        UserError: transformers does not support the image or patch shape.
    """
    (height, width), (patch_h, patch_w) = metadata["image_size"], metadata["patch_size"]
    is_square = height == width and patch_h == patch_w
    if model_type == "vit_mae" and not is_square:
        raise UserError(
            f"--to vit_mae: ViTMAE of transformers supports square images and patches only, not {height} x {width} pixels with "
            f"patches of {patch_h} x {patch_w}. Use --to mae, or --to vit for the encoder."
        )
    encoder, model = metadata["timm_kwargs"], metadata["config"]["model"]
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "hidden_size": encoder["embed_dim"],
        "num_hidden_layers": encoder["depth"],
        "num_attention_heads": encoder["num_heads"],
        "intermediate_size": int(encoder["embed_dim"] * encoder["mlp_ratio"]),
        "hidden_act": "gelu",
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": metadata["layer_norm_eps"],
        "image_size": height if height == width else [height, width],
        "patch_size": patch_h if patch_h == patch_w else [patch_h, patch_w],
        "num_channels": 3,
        "dtype": dtype,
        "torch_dtype": dtype,  # the name before transformers 5
    }
    if metadata["timm_kwargs"]["num_classes"]:
        names = metadata["label_names"]
        config |= {
            "architectures": [CLASSIFIER_ARCHITECTURE],
            "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)},
        }
    if model_type == "vit_mae":
        config |= {
            "decoder_hidden_size": model["decoder_width"],
            "decoder_num_hidden_layers": model["decoder_depth"],
            "decoder_num_attention_heads": model["decoder_heads"],
            "decoder_intermediate_size": 4 * model["decoder_width"],
            "mask_ratio": metadata["mask_ratio"],
            "norm_pix_loss": metadata["norm_pixel"],
        }
    return config


def build_preprocessor_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``preprocessor_config.json``: resize the whole image to the model's size and normalize as in training."""
    height, width = metadata["image_size"]
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(metadata["mean"]),
        "image_std": list(metadata["std"]),
    }
