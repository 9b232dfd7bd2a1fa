"""Weights to begin with: those of a file or folder from anywhere fill a new model, strictly, or nothing does.

Only what cannot matter is forgiven: classification heads are left out, a decoder that is wholly absent keeps its random start,
and position tables are interpolated where the image size differs. Each is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor

from scale_mae.checkpoint.safetensors_io import LazyTensor, TensorFiles, write_tensors
from scale_mae.checkpoint.store import CheckpointError
from scale_mae.config import Config, UserError
from scale_mae.distributed.process_group import World
from scale_mae.model.mae import MAE, POS_EMBED_NAMES
from scale_mae.model.sizes import LAYER_NORM_EPS, SIZES
from scale_mae.weights.export_formats import SAFETENSORS
from scale_mae.weights.importing import Weights, is_decoder, locate_weights, read_weights
from scale_mae.weights.key_matching import check_heads, check_names, checked, depth, fit_table, grid_of, more
from scale_mae.weights.metadata import METADATA_KEY, POOLING, TIMM_NAMES, describe, without_head
from scale_mae.weights.models import build_encoder, model_from_config
from scale_mae.weights.publish import publish

TIMM_ARGUMENTS = {"img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes", "global_pool"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def begin_with(model: MAE, weights: Weights) -> str:
    """Give a new model the weights of a file or folder; what was done, in one line.

    Raises:
        CheckpointError: a tensor missing, superfluous, of another shape or not finite. The model is spoilt then.
    """
    decoder, origin = weights.has_decoder, weights.origin
    wanted = {name: t for name, t in model.state_dict().items() if decoder or not is_decoder(name)}
    behind = _norm_is_behind(weights) and "task" in (origin.ours or {})
    if behind:
        wanted = {name: t for name, t in wanted.items() if not name.startswith("norm.")}
    check_names(wanted, weights)
    encoder, decoder_block = cast(Block, model.blocks[0]), cast(Block, model.decoder_blocks[0])
    check_heads(weights, encoder.attn.num_heads, decoder_block.attn.num_heads)
    told = [f"left out {weights.left_out[0]}{more(weights.left_out)}"] if weights.left_out else []
    if behind:
        told.append("its norm is behind the pooling (fc_norm), the encoder's starts anew")
    if not decoder:
        told.append("no decoder is there, it starts random")
    if origin.layer_norm_eps != LAYER_NORM_EPS:
        told.append(f"its norms' epsilon is {origin.layer_norm_eps:g}, here {LAYER_NORM_EPS:g}")
    for name, own in wanted.items():
        if name not in POS_EMBED_NAMES:
            own.copy_(checked(weights, name, own))
    grids = {"old": grid_of(weights, model.grid), "new": model.grid}
    for name in wanted.keys() & set(POS_EMBED_NAMES):
        table, said = fit_table(weights, name, wanted[name], grids)
        wanted[name].copy_(table)
        told += said
    about = [origin.kind, *([] if origin.step is None else [f"step {origin.step}"])]
    if digest := weights.digest():
        about.append(f"SHA-256 {digest[:16]}")
    return "; ".join([f"began with {weights.path} ({', '.join(about)})", *told])


def build_initial_model(config: Config, world: World, notes: list[str], *, resumed: bool) -> MAE:
    """The model that a run begins with, on the host, the same on every process. All call it.

    Args:
        config: ``model.init_from`` names the weights; without it they are random, a function of ``run.seed``.
        world: the processes.
        notes: what to tell of it is appended.
        resumed: a checkpoint is going to fill the model, so the weights of the beginning are not looked at.

    Raises:
        UserError: they are not there, do not fit, or are not the same for all processes.
    """
    model = model_from_config(config)
    if config.model.init_from and not resumed:
        notes.append(begin_everywhere(config.model.init_from, world, notes, lambda weights: begin_with(model, weights)))
    return model


def begin_everywhere(source: str, world: World, notes: list[str], begin: Callable[[Weights], str]) -> str:
    """Fill a model on every process; what ``begin`` said.

    Raises:
        UserError: the weights are not there, do not fit, or are not the same for all processes.
    """
    found = world.run_on_main(lambda: locate_weights(source, notes.append))
    note = world.run_on_all(lambda: begin(read_weights(found)))
    if len(set(world.all_gather(note))) > 1:
        raise UserError(f"model.init_from={source}: the processes found different weights there")
    return note


def initial_model(config: Config, warn: Callable[[str], None]) -> tuple[MAE, str]:
    """The model that a run begins with, on the host, in one process; and what there is to tell of it.

    Raises:
        UserError: the weights of ``model.init_from`` are not there, or do not fit.
    """
    model, source = model_from_config(config), config.model.init_from
    return model, begin_with(model, read_weights(locate_weights(source, warn))) if source else ""


def _flat(tensor: Tensor) -> list[Tensor]:
    return [tensor.detach().reshape(-1)]


def write_initial(config: Config, out: str | Path, warn: Callable[[str], None]) -> str:
    """Write all weights that a run of ``config`` begins with, under our names, with the facts about them.

    Args:
        config: with ``model.init_from``.
        out: a file; its name ends in ``.safetensors``.
        warn: told of damaged checkpoints that were passed over.

    Returns:
        What there is to tell, in one line.

    Raises:
        UserError: the weights do not fit, or ``out`` cannot be written.
    """
    out = Path(out)
    if out.suffix != SAFETENSORS or out.is_dir():
        raise UserError(f"--out {out}: the name of a file that ends in {SAFETENSORS}")
    if config.run.task != "pretrain":
        raise UserError(f"run.task={config.run.task}: the weights that pre-training begins with are written, no classifier's")
    model, note = initial_model(config, warn)
    state = model.state_dict()
    facts = describe(config, 0) | {"format": "state_dict", "dtype": "fp32", "began_with": note}
    lazily = {name: LazyTensor(tuple(t.shape), t.dtype, partial(_flat, t)) for name, t in state.items()}

    def check(target: Path) -> None:
        written = TensorFiles(target)
        if not all(torch.equal(written[name], t) for name, t in state.items()):
            raise UserError(f"{out}: not written; it reads back otherwise than it was written")

    nbytes = sum(tensor.nbytes for tensor in lazily.values())
    publish(out, nbytes, lambda target: write_tensors(target, lazily, {METADATA_KEY: json.dumps(facts)}), check)
    return note


def read_encoder(path: Path, warn: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An encoder from anywhere: facts for :func:`scale_mae.weights.models.build_encoder`, and its tensors.

    Raises:
        CheckpointError: not the weights of a plain ViT; one line.
    """
    return encoder_of(read_weights(locate_weights(path, warn)))


def encoder_of(weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`read_encoder` gives, of weights that are open already."""
    tensors = {name: t for name, t in weights.tensors.items() if not is_decoder(name)}
    behind = {name for name in weights.heads if name.startswith("fc_norm.")}
    if _norm_is_behind(weights):
        tensors |= {name.removeprefix("fc_"): weights.heads[name] for name in behind}
    weights = replace(weights, tensors=tensors)
    facts = dict(weights.origin.ours or _facts(weights, (1, 1)))
    if "task" in facts:  # a classifier of ours
        facts = without_head(facts)
    check_names(_wanted(facts, weights.path), weights)
    if not weights.origin.ours:
        facts = _facts(weights, grid_of(weights))
    if behind:
        facts["timm_kwargs"] = facts["timm_kwargs"] | {"global_pool": "avg"}
    tensors = {name: checked(weights, name, t) for name, t in _wanted(facts, weights.path).items()}
    if facts["timm_kwargs"]["global_pool"] == "avg":  # timm calls the final norm so then
        tensors = {re.sub(r"^norm\.", "fc_norm.", name): t for name, t in tensors.items()}
    return facts, tensors


def _norm_is_behind(weights: Weights) -> bool:
    """Whether they are of a classifier that was trained with mean pooling."""
    return "norm.weight" not in weights.tensors and any(name.startswith("fc_norm.") for name in weights.heads)


def _wanted(facts: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Empty tensors of the encoder that facts describe, under the names of class-token pooling."""
    try:
        if facts["timm_name"] not in TIMM_NAMES.values() or facts["timm_kwargs"].keys() - TIMM_ARGUMENTS:
            raise ValueError("it describes no encoder of a MAE")  # timm would do as told
        if facts["timm_kwargs"]["global_pool"] not in POOLING or facts["timm_kwargs"]["num_classes"]:
            raise ValueError("its encoder has a head")
        with torch.device("meta"):
            encoder = build_encoder(facts | {"timm_kwargs": facts["timm_kwargs"] | {"global_pool": "token"}})
    except Exception as error:  # timm checks little of what it is given
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{path}: what it says of itself is damaged ({reason[:200]})") from None
    return dict(encoder.state_dict())


def _facts(weights: Weights, grid: tuple[int, int]) -> dict[str, Any]:
    """Facts about a stranger's encoder with ``grid`` = (rows, columns) of patches.

    Sizes are told by the shapes, attention heads by what comes with the weights, or else by the published model of that width
    and depth; pixel statistics are ImageNet's where nothing says otherwise.
    """
    for name, dimensions in (("patch_embed.proj.weight", 4), ("blocks.0.mlp.fc1.weight", 2), ("pos_embed", 3)):
        if name not in weights.tensors or weights.tensors[name].dim() != dimensions:
            raise CheckpointError(f"{weights.path}: not weights of a plain ViT ({name} is missing or has another shape)")
    width, _, *patch = weights.tensors["patch_embed.proj.weight"].shape
    hidden, blocks, origin = (
        weights.tensors["blocks.0.mlp.fc1.weight"].shape[0],
        depth(weights.tensors, "blocks"),
        weights.origin,
    )
    published = {s.heads for s in SIZES.values() if (s.width, s.depth) == (width, blocks)}
    if origin.heads is None and len(published) != 1:
        raise CheckpointError(f"{weights.path}: the number of attention heads cannot be told (width {width}, depth {blocks})")
    image_size = [grid[0] * patch[0], grid[1] * patch[1]]
    return {
        "timm_name": TIMM_NAMES["tiny"],  # any plain ViT; the arguments say the rest
        "timm_kwargs": {
            "img_size": image_size,
            "patch_size": patch,
            "embed_dim": width,
            "depth": blocks,
            "num_heads": origin.heads or published.pop(),
            "mlp_ratio": (hidden + 0.5) / width,  # timm rounds the product down
            "num_classes": 0,
            "global_pool": "token",
        },
        "image_size": image_size,
        "patch_size": patch,
        "mean": list(origin.mean or IMAGENET_MEAN),
        "std": list(origin.std or IMAGENET_STD),
        "interpolation": "bicubic",
        "layer_norm_eps": origin.layer_norm_eps,
        "step": origin.step,
    }
